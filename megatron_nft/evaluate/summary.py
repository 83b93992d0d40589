"""Tables of an evaluation's results for people: Markdown, and the rows that the HTML page shows too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NOTE = (
    "Intervals are 95 % intervals over questions. Figures of the majority are upper bounds: correct answers are one "
    "vote whatever their form, wrong ones only where their forms are equal."
)


def percent(share: float) -> str:
    """Format a share as percent with one decimal: 0.517 -> `51.7`."""
    return f"{100 * share:.1f}"


def interval(estimate: Mapping[str, float]) -> str:
    """Format a mean with its interval, in percent: `51.7 [48.2, 55.1]`."""
    return f"{percent(estimate['mean'])} [{percent(estimate['low'])}, {percent(estimate['high'])}]"


def accuracy_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return a header and one row per benchmark, the average last."""
    header = [
        "benchmark",
        "questions",
        "answers each",
        "accuracy % [95 %]",
        "pass@N %",
        "maj@N %, at most",
        "tokens",
        "truncated %",
    ]
    rows = []
    for name, b in results["benchmarks"].items():
        n = str(b["samples"])
        rows.append(
            [
                f"{name} (avg@{n})",
                str(b["questions"]),
                n,
                interval(b["accuracy"]),
                percent(b["pass_at"][n]["mean"]),
                percent(b["majority_at"][n]["mean"]),
                f"{b['length']['mean']:.0f}",
                percent(b["truncated_share"]),
            ]
        )
    if results["average"] is not None:
        rows.append(["average", "", "", interval(results["average"]), "", "", "", ""])
    return header, rows


def k_table(results: Mapping[str, Any], metric: str, label: str) -> tuple[list[str], list[list[str]]] | None:
    """Return `metric` (`pass_at` or `majority_at`) over k; None where every benchmark has one answer per question."""
    ks = sorted({int(k) for b in results["benchmarks"].values() for k in b[metric]})
    if ks == [1]:
        return None
    rows = [
        [name] + [interval(b[metric][str(k)]) if str(k) in b[metric] else "" for k in ks]
        for name, b in results["benchmarks"].items()
        if len(b[metric]) > 1
    ]
    return ["benchmark", *(f"{label}@{k} %" for k in ks)], rows


def verdict_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Per benchmark and grader: accuracy, verdict shares and disagreement with the deciding grader."""
    header = ["benchmark", "grader", "accuracy %", "wrong %", "unparseable %", "no verdict %", "disagrees %"]
    rows = []
    for name, b in results["benchmarks"].items():
        for grader, g in b["graders"].items():
            shares = g["verdict_shares"]
            rows.append(
                [
                    name,
                    grader,
                    interval(g["accuracy"]),
                    percent(shares["wrong"]),
                    percent(shares["unparseable"]),
                    percent(shares["timeout"] + shares.get("no_verdict", 0.0)),  # absent in earlier files
                    percent(g["disagrees_share"]),
                ]
            )
    return header, rows


def length_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Per benchmark: lengths of the answers in tokens, and prompts over the protocol's limit."""
    header = ["benchmark", "mean tokens", "median", "95 %", "longest", "truncated %", "long prompts"]
    rows = [
        [
            name,
            *(f"{b['length'][key]:.0f}" for key in ("mean", "median", "p95", "max")),
            percent(b["truncated_share"]),
            str(b["over_long_prompts"]),
        ]
        for name, b in results["benchmarks"].items()
    ]
    return header, rows


def tables(results: Mapping[str, Any]) -> list[tuple[str, tuple[list[str], list[list[str]]]]]:
    """Return (title, table) in the order in which they are shown."""
    found = [
        ("Accuracy", accuracy_table(results)),
        ("pass@k (unbiased estimator)", k_table(results, "pass_at", "pass")),
        ("Majority of k answers (upper bound)", k_table(results, "majority_at", "maj")),
        ("Graders side by side", verdict_table(results)),
        ("Lengths", length_table(results)),
    ]
    return [(title, table) for title, table in found if table is not None]


def settings_rows(protocol: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return every setting of the protocol as (dotted key, value)."""
    rows: list[tuple[str, str]] = []

    def walk(value: Any, key: str) -> None:
        if isinstance(value, Mapping):
            for name, part in value.items():
                walk(part, f"{key}.{name}" if key else name)
        else:
            rows.append((key, str(value)))

    walk(protocol, "")
    return rows


def to_markdown(results: Mapping[str, Any]) -> str:
    """Return the whole result as Markdown."""
    parts = [f"# Evaluation of {results['protocol']['model']['path']}", ""]
    for title, (header, rows) in tables(results):
        parts += [f"## {title}", "", *_markdown_table(header, rows), ""]
    parts += [
        NOTE,
        "",
        "## Protocol",
        "",
        *_markdown_table(["setting", "value"], [list(row) for row in settings_rows(results["protocol"])]),
        "",
    ]
    return "\n".join(parts)


def to_text(results: Mapping[str, Any]) -> str:
    """Return the accuracy table for a terminal."""
    header, rows = accuracy_table(results)
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in [header, *rows])


def _markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    escape = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [header, *rows]]
    lines = ["| " + " | ".join(row) + " |" for row in escape]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]
