"""Puts one HTML file together: styles, scripts, data, all inside it."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from megatron_nft.report.entries import QuestionEntry
from megatron_nft.report.pack import Packer, encode

STATIC = Path(__file__).parent / "static"
SCRIPTS = ("data.js", "charts.js", "maths.js", "answers.js", "browser.js", "main.js")


def write_page(
    path: Path,
    *,
    title: str,
    subtitle: str,
    overview: str,
    metrics: dict[str, Any] | None,
    questions: Iterable[QuestionEntry],
    decode_tokens: Any = None,
    notes: Sequence[str] = (),
) -> int:
    """Write the page whole or not at all; returns its size in bytes.

    overview: HTML shown above the curves. metrics: `metrics_file.to_columns`, or None. questions are taken one by one,
    so that they need not fit in memory. decode_tokens: list of token ids -> list of their texts; None: no token view.
    """
    path = Path(path)
    with tempfile.TemporaryFile(dir=path.parent) as chunks, _replacing(path) as out:
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
            "DATA": "\n".join(
                _island(name, value)
                for name, value in (("metrics", metrics), ("index", index), ("tokens", texts), ("katex", _katex()))
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
    """A table as the overview shows it; the first column is text, the others are figures."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<h2>{html.escape(title)}</h2><div class="scroll">{table}</div>'


def _island(name: str, value: Any) -> str:
    """Data that the page's script reads by name."""
    raw = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    return f'<script type="text/plain" id="data-{name}">{encode(raw).decode("ascii")}</script>'


def _script() -> str:
    body = "\n".join((STATIC / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return f'(() => {{\n"use strict";\n{body}\n}})();'


@cache
def _katex() -> dict[str, str]:
    """KaTeX's script and its style with the fonts inside; families whose files are not shipped are left out."""
    folder = STATIC / "katex"

    def inline(face: re.Match[str]) -> str:
        name = re.search(r"url\(fonts/([^)]+\.woff2)\)", face.group(0)).group(1)
        if not (folder / "fonts" / name).is_file():
            return ""
        data = base64.b64encode((folder / "fonts" / name).read_bytes()).decode("ascii")
        return re.sub(r"src:[^}]*", f'src:url(data:font/woff2;base64,{data}) format("woff2")', face.group(0))

    css = (folder / "katex.min.css").read_text(encoding="utf-8")
    return {
        "css": re.sub(r"@font-face\{[^}]*\}", inline, css),
        "js": (folder / "katex.min.js").read_text(encoding="utf-8"),
    }


@contextmanager
def _replacing(path: Path):
    """A binary file beside `path` that takes its place when the block ends well."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as f:
            yield f
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
