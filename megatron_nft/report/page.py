"""Builds one self-contained HTML file from styles, scripts and data."""

from __future__ import annotations

import html
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_nft.files import replacing
from megatron_nft.report.embed import data_element, to_json
from megatron_nft.report.entries import QuestionEntry
from megatron_nft.report.pack import Packer

STATIC = Path(__file__).parent / "static"
SCRIPTS = ("data.js", "charts.js", "formulas.js", "answers.js", "browser.js", "main.js")


def write_page(
    path: Path,
    *,
    title: str,
    subtitle: str,
    overview: str,
    metrics: dict[str, Any] | None,
    questions: Iterable[QuestionEntry],
    decode_tokens: Callable[[list[int]], list[str]] | None = None,
    notes: Sequence[str] = (),
) -> int:
    """Write the page, whole or not at all, and return its size in bytes.

    Args:
        path: the file to write; a page that is there already stays until the new one is whole.
        title, subtitle, notes: plain text for the head of the page.
        overview: HTML shown below the curves.
        metrics: the result of `metrics_file.to_columns`; None for a page without curves.
        questions: what the answers tab shows; taken one by one, so that they need not fit in memory.
        decode_tokens: returns the text of each token id; None for a page without the view of tokens.
    """
    path = Path(path)
    with tempfile.TemporaryFile(dir=path.parent) as chunks, replacing(path) as out:
        packer = Packer(chunks)
        packer.add(questions)
        index = packer.index()
        ids = packer.token_ids
        texts = dict(zip(map(str, ids), decode_tokens(ids))) if decode_tokens is not None and ids else {}
        head = (STATIC / "page.html").read_text(encoding="utf-8")
        filled = {
            "TITLE": html.escape(title),
            "SUBTITLE": html.escape(subtitle),
            "NOTES": "".join(f"<li>{html.escape(note)}</li>" for note in notes),
            "OVERVIEW": overview,
            "CSS": (STATIC / "page.css").read_text(encoding="utf-8"),
            "DATA": "".join(
                data_element(f"data-{name}", to_json(value)).decode("ascii")
                for name, value in (("metrics", metrics), ("index", index), ("tokens", texts))
            ),
            "SCRIPT": _script(),
        }
        head = re.sub(r"\{\{([A-Z]+)\}\}", lambda match: filled[match.group(1)], head)
        out.write(head.encode("utf-8", "replace"))
        chunks.seek(0)
        shutil.copyfileobj(chunks, out)
        out.write(b'<script type="text/plain" id="end"></script>\n</body></html>\n')
        return out.tell()


def table_html(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """HTML of a table of the overview. The first column is text, the others are numbers."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<h2>{html.escape(title)}</h2><div class="scroll">{table}</div>'


def _script() -> str:
    body = "\n".join((STATIC / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return f'(() => {{\n"use strict";\n{body}\n}})();'
