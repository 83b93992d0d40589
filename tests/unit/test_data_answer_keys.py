"""Answer keys: what a source means by its boxes, its numbers and its copies, and what is refused."""

from __future__ import annotations

import json
import pickle
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_nft.cli import main
from megatron_nft.data.answer_keys import answer_of_solution, answer_text
from megatron_nft.data.benchmarks import BENCHMARKS, read_benchmark, read_prepared
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
        ("27.0", "27.0"),
        ("-0.0", "-0.0"),
        ("1.0e3", "1.0e3"),
        ("[27.0, 3]", "27.0, 3"),
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


@pytest.mark.parametrize(
    ("written", "key"),
    [("27.0", "27"), ("8", "8"), ('"14"', "14"), ("2.50", "2.50"), ("1e400", "1e400"), ("1.0E2", "100")],
)
def test_the_answers_of_amc_are_integers_whatever_its_file_says(tmp_path, written, key):
    path = tmp_path / "amc23.jsonl"
    path.write_text(f'{{"problem": "p", "answer": {written}}}\n')
    assert [q.answer for q in read_benchmark(BENCHMARKS["amc23"], path)] == [key]
    assert keys(path, [path.read_text()], "amc23") == [key]


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        (pa.decimal128(10, 2), ["1.50", "27.00", "-0.05"], ["1.50", "27.00", "-0.05"]),
        (pa.decimal128(20, 10), ["0", "1.5"], ["0.0000000000", "1.5000000000"]),
        (pa.decimal128(5, 0), ["27", "-3"], ["27", "-3"]),
        (pa.decimal256(76, 3), ["1" * 60 + ".250"], ["1" * 60 + ".250"]),
    ],
    ids=str,
)
def test_a_decimal_column_of_parquet_keeps_its_digits(tmp_path, kind, values, expected):
    path = tmp_path / "q.parquet"
    numbers = pa.array([Decimal(v) for v in values], kind)
    pq.write_table(pa.table({"problem": [f"p{i}" for i in range(len(values))], "answer": numbers}), path)
    made, _ = prepare("math_train", read_raw(path), str(path))
    assert [row["reward_model"]["ground_truth"] for row in made] == expected
    assert [q.answer for q in read_benchmark(BENCHMARKS["math500"], path)] == expected


@pytest.mark.parametrize(("kind", "value", "key"), [
    (pa.float32(), 0.1, "0.1"), (pa.float32(), 27.0, "27"), (pa.float32(), 1 / 3, "0.33333334"),
    (pa.float16(), 0.1, "0.1"), (pa.float64(), 1 / 3, "0.3333333333333333"), (pa.int64(), 27, "27"),
])  # fmt: skip
def test_short_numbers_of_parquet_are_not_filled_up_with_digits_that_they_lack(tmp_path, kind, value, key):
    path = tmp_path / "q.parquet"
    numbers = pa.array([np.float16(value)] if kind == pa.float16() else [value], kind)
    pq.write_table(pa.table({"problem": ["p"], "answer": numbers}), path)
    assert [row["reward_model"]["ground_truth"] for row in prepare("math_train", read_raw(path), "q")[0]] == [key]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("gsm8k_train", {"question": "q", "answer": None}),
        ("gsm8k", {"question": "q", "answer": float("nan")}),
        ("math_train", {"problem": "q", "solution": None}),
        ("minerva", {"problem": "q", "solution": None}),
        ("olympiadbench", {"question": "q", "final_answer": None}),
        ("olympiadbench", {"question": "q", "final_answer": ["1", None]}),
        ("dapo_math_17k", {"prompt": "q", "reward_model": None}),
        ("dapo_math_17k", {"prompt": "q", "reward_model": {"ground_truth": None}}),
        ("math_train", {"problem": "q", "answer": "NaN"}),
    ],
)
def test_a_missing_answer_is_an_error_in_every_set(tmp_path, name, row):
    with pytest.raises(
        DataError, match=r"q\.jsonl, row 1: .*there is no.* that a response could match.*--missing drop"
    ):
        keys(tmp_path / "q.jsonl", [json.dumps(row)], name)
    if name in BENCHMARKS:
        with pytest.raises(DataError, match=r"q\.jsonl, row 1: .* is (None|nan).* that a response could match"):
            read_benchmark(BENCHMARKS[name], tmp_path / "q.jsonl")


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("gsm8k_train", {"question": "q", "answer": 18}, r"column answer holds 18 \(int\), not a text"),
        ("gsm8k_train", {"question": "q", "answer": "18"}, "has no '####' before the result"),
        ("gsm8k_train", {"question": None, "answer": "#### 1"}, r"column problem holds None \(NoneType\), not a text"),
        ("olympiadbench", {"question": None, "context": "c", "final_answer": ["1"]}, "column question holds None"),
        ("math_train", {"problem": ["q"], "answer": "1"}, r"column problem holds \['q'\] \(list\)"),
        ("dapo_math_17k", {"prompt": "q", "reward_model": "1"}, r"reward_model is '1' \(str\); it has no ground_truth"),
    ],
)
def test_the_reason_of_a_dropped_row_is_one_of_its_data(tmp_path, name, row, reason):
    with pytest.raises(
        DataError, match=rf"none of the 1 rows can be used as {name}; 1 of them \(first: row 1\): .*{reason}"
    ):
        keys(tmp_path / "q.jsonl", [json.dumps(row)], name)


@pytest.mark.parametrize("digits", [400, 4000, 4001, 4301, 10_000])
@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"prompt": "p", "answer": %s}', r"column 'answer': 777\d+\.\.\. \(int\), not text; write the answer as text"),
        ('{"prompt": %s, "answer": "1"}', r"column 'prompt': 777\d+\.\.\. \(int\); write a text or a list"),
        ('{"prompt": [{"role": "user", "content": %s}], "answer": "1"}', r"content is 777\d+\.\.\. \(int\)"),
        ('{"prompt": "p", "answer": "1", "data_source": %s}', r"column 'data_source': 777\d+\.\.\. \(int\), not text"),
        ('{"prompt": "p", "reward_model": {"ground_truth": %s}}', r"'reward_model.ground_truth': 777\d+\.\.\. \(int\)"),
    ],
)
def test_a_long_integer_is_no_text_however_long_it_is(tmp_path, digits, row, said):
    path = tmp_path / "q.jsonl"
    path.write_text(row % ("7" * digits))
    with pytest.raises(DataError, match=rf"q\.jsonl, row 1.*{said}"):
        read_rows(path)


VERL = {"data_source": "d", "extra_info": {"index": 7}}


def eval_file(path, copies, layout):
    """The copies as a question file of our own, of verl's layout (every row with the same index), or of MATH-500's."""
    make = {
        "ours": lambda p, a: {"prompt": p, "answer": a},
        "verl": lambda p, a: {**VERL, "prompt": [{"role": "user", "content": p}], "reward_model": {"ground_truth": a}},
        "benchmark": lambda p, a: {"problem": p, "answer": a},
    }[layout]
    path.write_text("".join(json.dumps(make(p, a)) + "\n" for p, a in copies))
    return path


def eval_answers(path, layout, **options):
    questions = (
        read_benchmark(BENCHMARKS["math500"], path, **options)
        if layout == "benchmark"
        else read_prepared(path, **options)
    )
    return list(dict.fromkeys((q.messages[0]["content"].split("\n")[0], q.answer) for q in questions))


@pytest.mark.parametrize("layout", ["ours", "verl", "benchmark"])
def test_eval_refuses_copies_with_different_answers_with_their_rows(tmp_path, layout):
    path = eval_file(tmp_path / "q.jsonl", COPIES, layout)
    with pytest.raises(DataError, match=r"'4' at .*q\.jsonl, row 1, .*q\.jsonl, row 3 but '5' at .*row 2.*--conflicts"):
        eval_answers(path, layout)
    assert eval_answers(path, layout, conflicts="drop") == [("q", "1")]
    assert eval_answers(path, layout, conflicts="majority") == [("p", "4"), ("q", "1")]
    with pytest.raises(DataError, match=r"q\.jsonl: no question is left; the copies of each"):
        eval_answers(eval_file(path, [("p", "1"), ("p", "2")], layout), layout, conflicts="majority")


@pytest.mark.parametrize(
    ("copies", "drop", "majority"),
    [
        ([("p", "4"), ("p", "5"), ("q", "1")], [("q", "1")], [("q", "1")]),
        ([("p", "5"), ("p", "4"), ("p", "4"), ("q", "1")], [("q", "1")], [("p", "4"), ("q", "1")]),
        ([("p", "4"), ("p", "4 "), ("q", "1")], [("p", "4"), ("q", "1")], [("p", "4"), ("q", "1")]),
        ([("q", "1"), ("p", "2"), ("q", "1")], [("q", "1"), ("p", "2")], [("q", "1"), ("p", "2")]),
        ([("p", "1"), ("p", "2"), ("p", "3"), ("p", "2"), ("q", "1")], [("q", "1")], [("p", "2"), ("q", "1")]),
    ],
)
def test_what_eval_does_with_them_otherwise(tmp_path, copies, drop, majority):
    for layout in ("ours", "verl", "benchmark"):
        path = eval_file(tmp_path / "q.jsonl", copies, layout)
        assert [(q, a.strip()) for q, a in eval_answers(path, layout, conflicts="drop")] == drop, layout
        assert [(q, a.strip()) for q, a in eval_answers(path, layout, conflicts="majority")] == majority, layout


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
