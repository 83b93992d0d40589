"""The HTML page of an evaluation: result tables, protocol and all answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_nft.evaluate.records import read_answers
from megatron_nft.evaluate.summary import NOTE, settings_rows, tables
from megatron_nft.report.entries import AnswerEntry, QuestionEntry
from megatron_nft.report.page import table_html, write_page


def evaluation_page(folder: Path, results: Mapping[str, Any], path: Path) -> int:
    """Write the page and return its size in bytes.

    folder: folder of the evaluation with its answer files. results: content of its results.json. path: the page.
    """
    protocol = results["protocol"]
    parts = [table_html(title, header, rows) for title, (header, rows) in tables(results)]
    parts.append(f"<p>{NOTE}</p>")
    settings = table_html("protocol.json", ["setting", "value"], settings_rows(protocol))
    parts.append(f"<details open><summary>Protocol</summary>{settings}</details>")
    return write_page(
        path,
        title=f"Evaluation of {Path(protocol['model']['path']).name}",
        subtitle=f"protocol {protocol['preset']}, {protocol['protocol_hash'][:16]}",
        overview="\n".join(parts),
        metrics=None,
        questions=(
            entry for name in results["benchmarks"] for entry in _entries(folder / "answers" / f"{name}.jsonl", name)
        ),
    )


def _entries(path: Path, source: str) -> Iterator[QuestionEntry]:
    """Yield the questions of one answer file; `source` names the benchmark."""
    for _, record in read_answers(path):
        answers = [
            AnswerEntry(
                text=answer.text,
                num_tokens=answer.num_tokens,
                finish_reason=answer.finish_reason,
                verdict=str(answer.verdict),
                extracted=answer.extracted,
                grader_verdicts={name: str(verdict) for name, verdict in answer.grader_verdicts.items()},
                verify_s=answer.verify_s,
            )
            for answer in record.result.answers
        ]
        yield QuestionEntry(None, record.result.index, source, record.prompt, record.answer, answers)
