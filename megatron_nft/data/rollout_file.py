"""Rollouts on disk: one parquet file per training step and writing rank.

    run_dir/rollouts/step_000012/rank_00000.parquet

A file is complete or absent (files.py), so readers of a run in progress see whole files only. A surplus group appears
with fate `surplus` in the step that generated it and with its final fate in the step that trains it. Where answers
outlive a step (rollout.mode), a group appears once, in the step that trains or drops it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_nft.files import replacing
from megatron_nft.types import Prompt, Rollout, RolloutGroup

FATES = ("trained", "surplus", "all_correct", "all_wrong", "too_few", "too_old", "ignored", "untrained")
"""What became of an answer; `ignored` is an answer left out of a group that was otherwise used, `untrained` one of a
group that could have been trained in a step that failed for want of such groups."""

SCHEMA = pa.schema(
    [
        pa.field("step", pa.int32(), nullable=False),  # training step that the file belongs to
        pa.field("draw", pa.int64(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("prompt_index", pa.int64(), nullable=False),
        pa.field("data_source", pa.string(), nullable=False),
        pa.field("prompt_opens_thinking", pa.bool_()),  # the prompt ends in `<think>`, which grading must know
        pa.field("prompt_text", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),  # [P]
        pa.field("response_ids", pa.list_(pa.int32()), nullable=False),  # [R]
        pa.field("rollout_logprobs", pa.list_(pa.float32()), nullable=False),  # [R]
        pa.field("trainer_logprobs", pa.list_(pa.float32())),  # [R]; null where the trainer did not compute them
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("verdict", pa.string()),
        pa.field("reward", pa.float32()),  # in [0, 1]; null where the grader gave no number
        pa.field("extracted", pa.string()),
        pa.field("reason", pa.string()),  # of a verdict that no comparison gave; empty where there is none
        pa.field("reason_kind", pa.string()),  # types.ReasonKind; null where there is no reason
        pa.field("grader_verdicts", pa.string()),  # JSON object: grader -> verdict; null with a single grader
        pa.field("verify_s", pa.float32(), nullable=False),
        pa.field("correct_rate", pa.float32(), nullable=False),  # of the group, in [0, 1]
        pa.field("weight_version", pa.int32(), nullable=False),
        pa.field("weight_version_spans", pa.list_(pa.list_(pa.int32()))),  # [version, start, end] of each; null: one
        pa.field("fate", pa.string(), nullable=False),
    ],
    metadata={"megatron_nft.rollouts": "1"},
)

_ADDED = ("reason", "reason_kind", "prompt_opens_thinking", "reward", "weight_version_spans")
"""Columns that files of earlier versions lack; they read as null there."""

_STEP_FOLDER = re.compile(r"step_(\d+)$")


class RolloutFileError(ValueError):
    """A rollout file that cannot be read. The message names the file and what is wrong with it."""


def rollout_path(run_dir: Path, step: int, rank: int) -> Path:
    """Return the file into which `rank` writes the rollouts of training step `step`."""
    return Path(run_dir) / "rollouts" / f"step_{step:06d}" / f"rank_{rank:05d}.parquet"


def write_rollouts(path: Path, groups: Sequence[RolloutGroup], fates: Sequence[str], *, step: int) -> int:
    """Write every answer of `groups`; `fates[i]` says what became of group i. Return the number of rows.

    Answers with `ignored` set get the fate `ignored` whatever their group's. Text that is not valid Unicode (lone
    surrogates) is written with replacement characters. ValueError for an unknown fate or a count that does not match.
    """
    if len(groups) != len(fates):
        raise ValueError(f"{len(groups)} rollout groups but {len(fates)} fates: one fate per group is needed")
    unknown = sorted(set(fates) - set(FATES))
    if unknown:
        raise ValueError(f"unknown fate {', '.join(map(repr, unknown))}; known are {', '.join(FATES)}")
    rows = [_row(g, r, fate, step) for g, fate in zip(groups, fates) for r in g.rollouts]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        pq.write_table(table, file, compression="zstd", row_group_size=4096)
    return len(rows)


def list_rollout_files(run_dir: Path) -> list[tuple[int, Path]]:
    """Return (step, file) of every complete rollout file of a run, by step, then rank."""
    found = []
    for folder in (Path(run_dir) / "rollouts").glob("step_*"):
        match = _STEP_FOLDER.search(folder.name)
        if match:
            found += [(int(match.group(1)), path) for path in folder.glob("rank_*.parquet")]
    return sorted(found)


def read_rollout_file(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one file, or some of its columns. RolloutFileError where it is damaged or of another layout."""
    try:
        file = pq.ParquetFile(path)
        wanted = list(columns) if columns is not None else SCHEMA.names
        present = file.schema_arrow.names
        missing = [name for name in wanted if name not in present and name not in _ADDED]
        if missing:
            raise RolloutFileError(
                f"{path}: no column {', '.join(missing)}; it has {', '.join(present)}. "
                "It was written by another version or is not a rollout file"
            )
        table = file.read(columns=[name for name in wanted if name in present])
        for name in (name for name in wanted if name not in present):
            field = SCHEMA.field(name)
            table = table.add_column(wanted.index(name), field, pa.nulls(table.num_rows, field.type))
        return table
    except (pa.ArrowException, OSError) as e:
        raise RolloutFileError(f"{path}: cannot be read as parquet ({e}); remove it or restore it") from None


def prompt_text(prompt: Prompt) -> str:
    """Return the question as people read it: the only message's content, or every message under its role."""
    if len(prompt.messages) == 1:
        return prompt.messages[0]["content"]
    return "\n\n".join(f"[{m['role']}]\n{m['content']}" for m in prompt.messages)


def _row(group: RolloutGroup, rollout: Rollout, fate: str, step: int) -> dict[str, Any]:
    prompt = group.prompt
    return {
        "step": step,
        "draw": rollout.draw,
        "sample_index": rollout.sample_index,
        "prompt_index": prompt.index,
        "data_source": _unicode(prompt.data_source),
        "prompt_opens_thinking": prompt.opens_thinking,
        "prompt_text": _unicode(prompt_text(prompt)),
        "answer": _unicode(prompt.answer),
        "text": _unicode(rollout.text),
        "prompt_ids": np.asarray(prompt.token_ids, dtype=np.int32),
        "response_ids": np.asarray(rollout.response_ids, dtype=np.int32),
        "rollout_logprobs": np.asarray(rollout.rollout_logprobs, dtype=np.float32),
        "trainer_logprobs": None
        if rollout.trainer_logprobs is None
        else np.asarray(rollout.trainer_logprobs, dtype=np.float32),
        "finish_reason": rollout.finish_reason,
        "verdict": None if rollout.verdict is None else str(rollout.verdict),
        "reward": rollout.reward,
        "extracted": None if rollout.extracted is None else _unicode(rollout.extracted),
        "reason": _unicode(rollout.reason),
        "reason_kind": None if rollout.reason_kind is None else str(rollout.reason_kind),
        "grader_verdicts": json.dumps({k: str(v) for k, v in rollout.grader_verdicts.items()})
        if len(rollout.grader_verdicts) > 1
        else None,
        "verify_s": rollout.verify_s,
        "correct_rate": group.correct_rate,
        "weight_version": rollout.weight_version,
        "weight_version_spans": rollout.weight_version_spans or None,
        "fate": "ignored" if rollout.ignored else fate,
    }


def _unicode(text: str) -> str:
    """`text` with what UTF-8 cannot hold replaced: a row is never lost to a bad character."""
    return text.encode("utf-8", "replace").decode("utf-8")
