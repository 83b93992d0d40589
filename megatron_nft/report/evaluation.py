"""The HTML page of an evaluation: result tables, protocol and all answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_nft.evaluate.summary import settings_rows, tables
from megatron_nft.report.entries import answer_entries
from megatron_nft.report.page import table_html, write_page


def evaluation_page(folder: Path, results: Mapping[str, Any], path: Path) -> int:
    """Write the page and return its size in bytes.

    folder: folder of the evaluation with its answer files. results: content of its results.json. path: the page.
    """
    protocol = results["protocol"]
    parts = [table_html(title, header, rows) for title, (header, rows) in tables(results)]
    parts.append("<p>Intervals are 95 % bootstrap intervals over questions.</p>")
    settings = table_html("protocol.json", ["setting", "value"], settings_rows(protocol))
    parts.append(f"<details open><summary>Protocol</summary>{settings}</details>")
    return write_page(
        path,
        title=f"Evaluation of {Path(protocol['model']['path']).name}",
        subtitle=f"protocol {protocol['preset']}, {protocol['protocol_hash'][:16]}",
        overview="\n".join(parts),
        metrics=None,
        questions=(
            entry
            for name in results["benchmarks"]
            for entry in answer_entries(folder / "answers" / f"{name}.jsonl", name)
        ),
    )
