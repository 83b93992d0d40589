"""Answer keys: what a source means by its boxes, its numbers and its copies, and what is refused."""

from __future__ import annotations

import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_nft.cli import main
from megatron_nft.data.benchmarks import answer_of_solution, answer_text
from megatron_nft.data.conflicts import Copies, refuse_conflicts
from megatron_nft.data.prepare import prepare
from megatron_nft.data.rows import DataError, read_raw, read_rows
from megatron_nft.files import JsonFloat


def keys(path, lines, name="math_train", **options):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    made, _ = prepare(name, read_raw(path), str(path), **options)
    return [row["reward_model"]["ground_truth"] for row in made]


@pytest.mark.parametrize(
    ("solution", "key"),
    [
        (r"Hence $\boxed 2$.", "2"),
        (r"so the answer is \boxed x", "x"),
        (r"$x = \boxed{3}$ or $x = \boxed{7}$", "3, 7"),
        (r"\boxed{(2,5)} and \boxed{(8,5)}", "(2,5), (8,5)"),
        (r"First we get \boxed{5}. That was too fast: \boxed{6}.", "6"),
        (r"\boxed{\boxed{9}}", r"9"),
        (r"a share of \boxed{10}\%", "10"),
    ],
)
def test_boxes_of_a_solution(solution, key):
    assert answer_of_solution(solution).removeprefix(r"\boxed{").removesuffix("}") == key


@pytest.mark.parametrize(
    ("written", "key"),
    [
        ("6.02e23", "6.02e23"),
        ("2.50", "2.50"),
        ("1E-7", "1E-7"),
        ("0.1000", "0.1000"),
        ("27.0", "27"),  # a whole number, as data sets made by pandas write it
        ("-3", "-3"),
        ("1e400", "1e400"),  # more than a float holds, and still a number
        ("9007199254740993", "9007199254740993"),
        ("1" * 309, "1" * 309),
        ("1" * 4001, "1" * 4001),
        ("-" + "1" * 4301, "-" + "1" * 4301),
        ("1" * 10000, "1" * 10000),
        ('["2", 6.02e23]', "2, 6.02e23"),
    ],
    ids=lambda text: text[:12],
)
def test_a_number_keeps_the_text_that_it_has_in_the_file(tmp_path, written, key):
    assert keys(tmp_path / "q.jsonl", [f'{{"problem": "p", "answer": {written}}}']) == [key]


@pytest.mark.parametrize(
    ("value", "key"),
    [(27.0, "27"), (6.02e23, "6.02e+23"), (0.1, "0.1"), (-2.0, "-2"), (2.0**53, "9007199254740992.0"), (10**400, None)],
    ids=str,
)
def test_numbers_of_parquet_have_no_text_but_their_value(value, key):
    assert answer_text(value) == (str(value) if key is None else key)


def test_a_json_number_survives_another_process_and_json():
    number = pickle.loads(pickle.dumps(JsonFloat("6.02e23")))
    assert (number, number.text) == (6.02e23, "6.02e23")
    assert json.loads(json.dumps({"x": number})) == {"x": 6.02e23}


@pytest.mark.parametrize("written", ["NaN", "Infinity", "-Infinity", "null", '["2", null]', "[NaN]"])
def test_an_answer_that_is_none_is_an_error_with_file_and_row(tmp_path, written):
    lines = ['{"problem": "p", "answer": "1"}', f'{{"problem": "q", "answer": {written}}}']
    with pytest.raises(DataError, match=r"q\.jsonl, row 2: the answer is .*--missing drop"):
        keys(tmp_path / "q.jsonl", lines)
    assert keys(tmp_path / "q.jsonl", lines, missing="drop") == ["1"]


def test_a_column_of_pandas_holds_nan_where_an_answer_is_missing(tmp_path):
    path = tmp_path / "q.parquet"
    pq.write_table(pa.table({"problem": ["p", "q", "r"], "answer": [1.0, float("nan"), float("inf")]}), path)
    with pytest.raises(DataError, match=r"q\.parquet, row 2: the answer is nan"):
        prepare("math_train", read_raw(path), str(path))
    made, summary = prepare("math_train", read_raw(path), str(path), missing="drop")
    assert len(made) == 1 and sum(summary.dropped.values()) == 2


COPIES = [("p", "4"), ("p", "5"), ("p", "4"), ("q", "1")]


def lines(copies):
    return [json.dumps({"problem": problem, "answer": answer}) for problem, answer in copies]


def test_copies_with_different_answers_are_listed_with_their_rows(tmp_path):
    with pytest.raises(DataError, match=r"1 question has copies .*: '4' at row 1, row 3 but '5' at row 2"):
        keys(tmp_path / "q.jsonl", lines(COPIES))


@pytest.mark.parametrize(
    ("copies", "drop", "majority"),
    [
        (COPIES, ["1"], ["4", "1"]),
        ([("p", "4"), ("p", "5"), ("q", "1")], ["1"], ["1"]),  # as many of each: nothing says which is right
        ([("p", "5"), ("p", "4"), ("p", "4"), ("p", "4")], None, ["4"]),
        ([("p", "4"), ("p", " 4 ")], ["4"], ["4"]),
        ([("p", "1"), ("p", "2"), ("p", "3"), ("p", "2"), ("q", "7")], ["7"], ["2", "7"]),
        ([("q", "1"), ("p", "4"), ("q", "1"), ("p", "5"), ("p", "5")], ["1"], ["1", "5"]),
    ],
)
def test_what_becomes_of_them_otherwise(tmp_path, copies, drop, majority):
    path = tmp_path / "q.jsonl"
    if drop is None:
        with pytest.raises(DataError, match=r"none of the 4 rows can be used .* copies have different answers"):
            keys(path, lines(copies), conflicts="drop")
    else:
        assert keys(path, lines(copies), conflicts="drop") == drop
    assert keys(path, lines(copies), conflicts="majority") == majority


def test_every_row_is_accounted_for():
    rows = [(n, {"problem": p, "answer": a}) for n, (p, a) in enumerate([*COPIES, ("q", "1"), ("r", "")], 1)]
    for conflicts, written, left_out in (("drop", 1, 3), ("majority", 2, 1)):
        _, s = prepare("math_train", iter(rows), "x", conflicts=conflicts)
        assert (s.written, s.conflicts, s.conflict_rows) == (written, 1, left_out)
        assert s.read == s.written + s.duplicates + s.conflict_rows + sum(s.dropped.values())


def test_the_command_takes_both_choices(tmp_path, capsys):
    source = tmp_path / "q.jsonl"
    source.write_text("\n".join([*lines(COPIES), '{"problem": "r", "answer": null}']), encoding="utf-8")
    command = ["prepare", "math_train", str(tmp_path / "out.jsonl"), "--from", str(source)]
    assert main(command) == 1 and "row 5: the answer is None" in capsys.readouterr().err
    assert main([*command, "--missing", "drop"]) == 1 and "'5' at row 2" in capsys.readouterr().err
    assert main([*command, "--missing", "drop", "--conflicts", "majority"]) == 0
    assert "1 questions have copies with different answers; 1 rows left out" in capsys.readouterr().err
    assert [row.answer for row in read_rows(tmp_path / "out.jsonl")] == ["4", "1"]


def test_many_conflicts_are_cut_short():
    copies = Copies()
    for question in range(30):
        for answer in range(2):
            copies.add(question, str(answer), f"row {2 * question + answer}")
    with pytest.raises(DataError, match=r"30 questions have .* and 20 more questions\. hint"):
        copies.refuse("hint")
    refuse_conflicts([("p", "4", "a, row 1"), ("p", "4", "b, row 9"), ("q", "5", "b, row 10")])


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("1+1=", "1+1="),
        ([{"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1="}]}], "1+1="),
        ([{"role": "user", "content": "1+1=", "name": "x"}], "1+1="),
        ([], None),
        ([{"role": "user", "content": [{"type": "image", "image": "x.png"}]}], None),
        ([{"role": "user", "content": []}], None),
        (["1+1="], None),
        (None, None),
    ],
)
def test_prompts_of_every_form_are_read_or_named(tmp_path, prompt, text):
    row = {"prompt": prompt, "reward_model": {"ground_truth": "2"}}
    if text is None:
        with pytest.raises(DataError, match=r"q\.jsonl: none of the 1 rows .*row 1\): the prompt cannot be used: "):
            keys(tmp_path / "q.jsonl", [json.dumps(row)], "dapo_math_17k")
    else:
        path = tmp_path / "q.jsonl"
        path.write_text(json.dumps(row))
        made, _ = prepare("dapo_math_17k", read_raw(path), str(path), instruction="")
        assert made[0]["prompt"] == [{"role": "user", "content": text}]
