"""The HTML page of a training run that has ended or is still in progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from megatron_nft.data.rollout_file import list_rollout_files
from megatron_nft.report.entries import QuestionEntry, rollout_entries
from megatron_nft.report.metrics_file import read_metrics, to_columns
from megatron_nft.report.page import table_html, write_page

PACKED_COLUMNS = ("prompt_text", "text", "response_ids", "rollout_logprobs", "trainer_logprobs", "extracted")
PAGE_BYTES_PER_PARQUET_BYTE = 1.3
"""Measured: parquet (zstd) compresses these columns about as well as the page does; base64 then adds a third."""


class ReportError(ValueError):
    """Raised for a folder that is not a run folder. The message says what was looked for."""


def run_page(
    run_dir: Path,
    path: Path,
    *,
    max_rollouts: int,
    max_bytes: int,
    tokenizer_dir: Path | None = None,
    on_file: Callable[[], Any] = lambda: None,
) -> int:
    """Write the page of the run in `run_dir` to `path` and return its size in bytes.

    Where the run has more than `max_rollouts` answers, or enough for a page of more than about `max_bytes`, whole
    questions are left out evenly over the run, and the page says so.

    Args:
        tokenizer_dir: folder with the run's tokenizer; None to look in the run's own folder and its model.
        on_file: called after each rollout file.

    Raises:
        ReportError: `run_dir` is not a run folder.
        ValueError: `tokenizer_dir` has no tokenizer, or a rollout file is damaged.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ReportError(f"{run_dir} is no folder")
    records, notes = read_metrics(run_dir / "metrics.jsonl")
    files, broken = _sizes(list_rollout_files(run_dir))
    if not records and not files and not broken:
        raise ReportError(f"{run_dir} is no run folder: it has neither metrics.jsonl nor rollouts/step_*/")
    total = sum(rows for _, rows, _ in files)
    share = _share(files, max_rollouts, max_bytes)
    if share < 1:
        notes.append(
            f"about {share:.1%} of {total:,} rollouts are in this page, evenly over the run "
            "(--max-rollouts, --max-mb); all are in rollouts/"
        )
    decode, why_not = _token_decoder(run_dir, tokenizer_dir)
    notes += [*broken, *why_not]
    return write_page(
        path,
        title=f"Run {run_dir.resolve().name}",
        subtitle=_subtitle(records, total),
        overview=_settings_table(run_dir),
        metrics=to_columns(records) if records else None,
        questions=_thinned([p for p, _, _ in files], share, on_file),
        decode_tokens=decode,
        notes=notes,
    )


def _sizes(files: Sequence[tuple[int, Path]]) -> tuple[list[tuple[Path, int, int]], list[str]]:
    """(file, rows, compressed bytes of what the page shows) from each footer, and a note for each broken file."""
    found, notes = [], []
    for _, path in files:
        try:
            meta = pq.ParquetFile(path).metadata
        except (pa.ArrowException, OSError) as e:
            notes.append(f"{path.parent.name}/{path.name} cannot be read and is left out: {e}")
            continue
        size = sum(
            column.total_compressed_size
            for group in map(meta.row_group, range(meta.num_row_groups))
            for column in map(group.column, range(group.num_columns))
            if column.path_in_schema.split(".")[0] in PACKED_COLUMNS
        )
        found.append((path, meta.num_rows, size))
    return found, notes


def _share(files: Sequence[tuple[Path, int, int]], max_rollouts: int, max_bytes: int) -> float:
    """The share of all questions that fits in the page."""
    rows = sum(n for _, n, _ in files)
    size = PAGE_BYTES_PER_PARQUET_BYTE * sum(s for _, _, s in files)
    return min(1.0, max_rollouts / max(rows, 1), max_bytes / max(size, 1))


def _thinned(files: Sequence[Path], share: float, on_file: Callable[[], Any]) -> Iterator[QuestionEntry]:
    """Every question, or an even `share` of them: number i is kept where i * share passes a whole number."""
    i = 0
    for path in files:
        for entry in rollout_entries(path):
            if int((i + 1) * share + 1e-9) > int(i * share + 1e-9):
                yield entry
            i += 1
        on_file()


def _subtitle(records: list[dict[str, Any]], rollouts: int) -> str:
    steps = f"step {records[-1]['step']}" if records else "no step yet"
    return f"{steps}, {rollouts:,} rollouts"


def _settings(run_dir: Path) -> dict[str, Any]:
    """The run's resolved settings; empty where config.yaml is missing or damaged."""
    try:
        value = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def _settings_table(run_dir: Path) -> str:
    rows: list[tuple[str, str]] = []

    def walk(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, part in value.items():
                walk(part, f"{key}.{name}" if key else str(name))
        else:
            rows.append((key, str(value)))

    settings = _settings(run_dir)
    if not settings:
        return ""
    walk(settings, "")
    return f"<details><summary>Settings</summary>{table_html('config.yaml', ['setting', 'value'], rows)}</details>"


def _token_decoder(run_dir: Path, given: Path | None) -> tuple[Callable[[list[int]], list[str]] | None, list[str]]:
    """A function from token ids to their texts, or None and a note that the page cannot show tokens."""
    from megatron_nft.data.prompts import load_tokenizer

    if given is not None:
        return partial(_decode_each, load_tokenizer(given)), []
    model = (_settings(run_dir).get("model") or {}).get("path")
    for place in (run_dir / "hf", Path(model or run_dir)):
        try:
            return partial(_decode_each, load_tokenizer(place)), []
        except ValueError:
            continue
    return None, ["tokens are not shown: no tokenizer was found in the run or in model.path; name one with --tokenizer"]


def _decode_each(tokenizer: Any, ids: list[int]) -> list[str]:
    texts: list[str] = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    return texts
