"""Kinds of answers that users of such graders report as misjudged, each with variations and their right verdicts.

tests/golden/grading_kinds.jsonl   answer, response, expect (correct, or wrong for anything else), kind
tests/golden/second_reader.jsonl   the same kinds, written by somebody else before the grader was changed
tests/golden/fresh_rows.jsonl      fifteen more of each kind, written before the grader's verdicts on them were seen
../shared/cases/grading.jsonl      rows of the first report
"""

import json
from collections import Counter
from pathlib import Path

import pytest
from verify_rewrites import DATA

from megatron_nft.verify import grade_one

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = DATA.parent / "cases" / "grading.jsonl"
ALLOWED_DISAGREEMENT = 0.06
DISAGREEMENTS: dict[str, dict[int, str]] = {
    "second_reader.jsonl": {},
    "fresh_rows.jsonl": {
        41: "thinking that is reopened may take the answer before it back",
        55: "b is a letter of its own where B is one",
        119: "nobody puts the digits of 12 in braces",
    },
}
"""File -> line -> why our verdict differs from the row's."""


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


KINDS = rows_of(GOLDEN / "grading_kinds.jsonl")


def agrees(row: dict) -> bool:
    graded = grade_one(row["response"], row["answer"])
    return (graded.verdict == "correct") == (row["expect"] == "correct")


@pytest.mark.parametrize("row", KINDS, ids=[f"{row['kind']}-{index}" for index, row in enumerate(KINDS, 1)])
def test_kind(row):
    assert agrees(row), grade_one(row["response"], row["answer"])


def test_each_kind_has_variations_and_counterexamples():
    counts = Counter(row["kind"] for row in KINDS)
    assert len(counts) == 14 and min(counts.values()) >= 10
    assert all(any(row["kind"] == kind and row["expect"] == "wrong" for row in KINDS) for kind in counts)


@pytest.mark.skipif(not CASES.is_file(), reason=f"no {CASES} (set NFT_DATA_DIR to the folder data beside it)")
def test_reported_cases():
    rows = rows_of(CASES)
    assert len(rows) >= 40
    assert [row for row in rows if not agrees(row)] == []


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_another_reader_agrees(name):
    rows = rows_of(GOLDEN / name)
    differing = {number for number, row in enumerate(rows, start=1) if not agrees(row)}
    assert len(rows) >= 150
    assert differing == set(DISAGREEMENTS[name])
    assert len(differing) <= ALLOWED_DISAGREEMENT * len(rows)
