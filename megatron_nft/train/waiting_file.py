"""Open groups in parquet: the answers of a checkpoint that go on in the next step, or wait to be trained.

A row is an answer with tokens, finished or not; a question without any has one row with sample_index -1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_nft.engines.engine import Completion
from megatron_nft.train.buffer import OpenGroup
from megatron_nft.types import Prompt, ReasonKind, Rollout, Verdict

NO_ANSWER = -1
SCHEMA = pa.schema(
    [
        ("draw", pa.int64()),
        ("sample_index", pa.int32()),
        ("response_ids", pa.list_(pa.int32())),
        ("rollout_logprobs", pa.list_(pa.float32())),
        ("weight_version", pa.int64()),
        ("weight_version_spans", pa.list_(pa.list_(pa.int64()))),
        ("graded", pa.string()),  # JSON object; null where the answer is unfinished
    ]
)
_GRADED = (
    *("finish_reason", "text", "verdict", "reward", "extracted", "reason", "reason_kind"),
    *("grader_verdicts", "verify_s", "ignored"),
)
"""Fields of Rollout that an unfinished answer lacks. JSON keeps floats exactly, and text that is no valid Unicode."""


def write_waiting(path: Path, groups: Sequence[OpenGroup]) -> None:
    """Write one rank's open groups, in order."""
    rows = [row for group in groups for row in _rows(group)]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, compression="zstd")


def read_waiting(folder: Path, prompt_of: Callable[[int], Prompt], rank: int, world_size: int) -> list[OpenGroup]:
    """The open groups of a checkpoint folder that `rank` owns, in draw order, whatever layout wrote them.

    prompt_of: the question of a draw.
    """
    groups: dict[int, OpenGroup] = {}
    for path in sorted((folder / "waiting").glob("rank_*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                draw = row["draw"]
                if draw % world_size != rank:
                    continue
                if draw not in groups:
                    groups[draw] = OpenGroup(draw, prompt_of(draw))
                _add(groups[draw], row)
    return [groups[draw] for draw in sorted(groups)]


def _rows(group: OpenGroup) -> Iterator[dict[str, Any]]:
    empty = dict.fromkeys(SCHEMA.names) | {"draw": group.draw}
    if not group.begun and not group.answers:
        yield empty | {"sample_index": NO_ANSWER}
    for sample, begun in group.begun.items():
        yield empty | {
            "sample_index": sample,
            "response_ids": begun.token_ids,
            "rollout_logprobs": begun.logprobs,
            "weight_version": begun.weight_version,
            "weight_version_spans": begun.weight_version_spans,
        }
    for sample, rollout in group.answers.items():
        yield empty | {
            "sample_index": sample,
            "response_ids": rollout.response_ids,
            "rollout_logprobs": rollout.rollout_logprobs,
            "weight_version": rollout.weight_version,
            "weight_version_spans": rollout.weight_version_spans,
            "graded": json.dumps({name: getattr(rollout, name) for name in _GRADED}),
        }


def _add(group: OpenGroup, row: dict[str, Any]) -> None:
    sample = row["sample_index"]
    if sample == NO_ANSWER:
        return
    ids = np.array(row["response_ids"], dtype=np.int32)
    logprobs = np.array(row["rollout_logprobs"], dtype=np.float32)
    spans = tuple((version, start, end) for version, start, end in row["weight_version_spans"])
    if row["graded"] is None:
        group.begun[sample] = Completion(ids, logprobs, "stopped", row["weight_version"], spans)
        return
    graded = json.loads(row["graded"])
    graded["verdict"] = Verdict(graded["verdict"])
    graded["reason_kind"] = None if graded["reason_kind"] is None else ReasonKind(graded["reason_kind"])
    graded["grader_verdicts"] = {name: Verdict(verdict) for name, verdict in graded["grader_verdicts"].items()}
    group.answers[sample] = Rollout(
        draw=group.draw,
        sample_index=sample,
        response_ids=ids,
        rollout_logprobs=logprobs,
        weight_version=row["weight_version"],
        weight_version_spans=spans,
        **graded,
    )
