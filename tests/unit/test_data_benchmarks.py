"""The public benchmarks as they are published, and files that cannot be used."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_nft.data.answer_keys import answer_of_solution, answer_text
from megatron_nft.data.benchmarks import (
    BENCHMARKS,
    BOXED_INSTRUCTION,
    BenchmarkError,
    find_file,
    read_benchmark,
    read_prepared,
)
from megatron_nft.data.rows import DataError
from megatron_nft.types import Verdict
from megatron_nft.verify import grade_one

PUBLIC = Path(os.environ.get("NFT_DATA_DIR", Path(__file__).parents[2] / "../shared/data"))
needs_public = pytest.mark.skipif(
    not (PUBLIC / "eval").is_dir(), reason=f"public data not found at {PUBLIC} (set NFT_DATA_DIR)"
)


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


@needs_public
@pytest.mark.parametrize("name", BENCHMARKS)
def test_public_files_are_read_whole(name):
    benchmark = BENCHMARKS[name]
    questions = read_benchmark(benchmark, find_file(benchmark, PUBLIC))
    assert len(questions) == benchmark.num_questions
    assert len({q.id for q in questions}) == len(questions)
    for q in questions:
        assert q.answer.strip()
        assert q.messages[-1]["content"].endswith("\n" + BOXED_INSTRUCTION)


@needs_public
@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("aime24", "204", "902"),
        ("aime25", "70", "240"),
        ("amc23", "27", "8"),  # written as 27.0 and 8.0
        ("math500", "\\left( 3, \\frac{\\pi}{2} \\right)", "106^\\circ"),
        ("minerva", "1.6", "10.1"),  # the last box of the solution
        ("olympiadbench", "2", "11"),
        ("gsm8k", "18", "14"),  # after ####
    ],
)
def test_reference_answers_as_published(name, first, last):
    questions = read_benchmark(BENCHMARKS[name], find_file(BENCHMARKS[name], PUBLIC))
    assert (questions[0].answer, questions[-1].answer) == (first, last)


@needs_public
def test_copies_of_a_question_are_read_once_and_prompts_stand_as_they_are():
    questions = read_benchmark(BENCHMARKS["aime24"], PUBLIC / "eval" / "dapo_aime-2024.parquet")  # 30 questions x 32
    assert len(questions) == 30
    assert questions[0].messages[0]["content"].startswith("Solve the following math problem step by step.")
    assert BOXED_INSTRUCTION not in questions[0].messages[0]["content"]
    published = {q.answer for q in read_benchmark(BENCHMARKS["aime24"], PUBLIC / "eval" / "aime24.jsonl")}
    assert {q.answer.lstrip("0") for q in questions} == {a.lstrip("0") for a in published}


def verl_row(**changes):
    row = {"data_source": "d", "prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"ground_truth": "2"}}
    return {**row, "extra_info": {"index": 7}, **changes}


def test_published_files_may_carry_columns_of_their_own(tmp_path):
    other = [{"role": "user", "content": "1.5+1.5?"}]
    rows = [
        verl_row(answer="2", responses=["a"]),
        verl_row(),
        verl_row(prompt=other, reward_model={"ground_truth": 3.0}),
    ]
    path = write_jsonl(tmp_path / "aime24.jsonl", *rows)
    assert [(q.id, q.answer, q.data_source) for q in read_benchmark(BENCHMARKS["aime24"], path)] == [
        ("7", "2", "d"),  # the second row is a copy
        ("7", "3.0", "d"),  # a number keeps its text
    ]


def test_question_files_of_our_own(tmp_path):
    path = write_jsonl(tmp_path / "mine.jsonl", {"prompt": "1+1?", "answer": "2"}, {"prompt": "1+2?", "answer": "3"})
    questions = read_prepared(path)
    assert [(q.id, q.messages[0]["content"], q.answer) for q in questions] == [("1", "1+1?", "2"), ("2", "1+2?", "3")]
    write_jsonl(path, {"prompt": "1+1?", "anwser": "2"})
    with pytest.raises(DataError, match=r"row 1: column 'reward_model' \(or 'answer'\) is missing"):
        read_prepared(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": [{"role": "user"}]}, r"row 1: column prompt: .* each message has role and content"),
        ({"prompt": []}, r"row 1: column prompt: \[\] \(list\); write a text or a list"),
        ({"prompt": None}, "row 1: .*NoneType"),
        (
            {"reward_model": {"style": "rule"}},
            r"row 1: reward_model is \{'style': 'rule'\} \(dict\); it has no ground_truth",
        ),
        ({"reward_model": "2"}, r"row 1: reward_model is '2' \(str\); it has no ground_truth"),
        ({"reward_model": None}, r"row 1: reward_model is None \(null\)"),
        ({"extra_info": "7"}, r"row 1: column extra_info holds '7' \(str\), not a mapping"),
        ({"reward_model": {"ground_truth": None}}, "row 1: the answer is None"),
    ],
)
def test_broken_rows_of_verls_layout_are_named(tmp_path, changes, message):
    path = write_jsonl(tmp_path / "aime24.jsonl", verl_row(**changes))
    with pytest.raises(BenchmarkError, match=message):
        read_benchmark(BENCHMARKS["aime24"], path)


def test_without_a_network_the_hub_says_what_to_do(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BenchmarkError, match=r"amc23: ChenDRAG/VeRL_math_validation/amc2023.*with --data"):
        find_file(BENCHMARKS["amc23"], None)


def test_files_are_looked_for_in_the_folder_and_its_eval(tmp_path):
    (tmp_path / "eval").mkdir()
    path = write_jsonl(tmp_path / "eval" / "minerva_math.jsonl", {"problem": "p", "solution": "\\boxed{1}"})
    assert find_file(BENCHMARKS["minerva"], tmp_path) == path
    with pytest.raises(BenchmarkError, match=r"no file for benchmark amc23 in .*: looked for amc23\.jsonl, amc2023"):
        find_file(BENCHMARKS["amc23"], tmp_path)
    with pytest.raises(BenchmarkError, match="does not exist"):
        find_file(BENCHMARKS["amc23"], tmp_path / "absent")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"problem": "p"}, "row 2: no column 'answer'; it has problem"),
        ({"problem": "p", "answer": None}, "row 2: the answer is None"),
        ({"problem": "p", "answer": {"a": 1}}, r"row 2: the answer is .* \(dict\)"),
        ({"problem": "p", "answer": True}, r"row 2: the answer is True \(bool\)"),
        ({"problem": "p", "answer": []}, r"row 2: the answer is \[\]"),
        ({"problem": "p", "answer": "nan"}, r"row 2: the answer is the text 'nan'"),
        ({"problem": 10**400, "answer": "1"}, r"row 2: column problem holds 10000*\.\.\. \(int\), not a text"),
        ({"problem": 5, "answer": "1"}, r"row 2: column problem holds 5 \(int\)"),
        ({"problem": " ", "answer": "1"}, "row 2: column problem is empty"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path, row, message):
    path = write_jsonl(tmp_path / "math500.jsonl", {"problem": "1+1?", "answer": 2}, row)
    with pytest.raises(BenchmarkError, match=message):
        read_benchmark(BENCHMARKS["math500"], path)


def test_files_that_cannot_be_used_are_named(tmp_path):
    path = tmp_path / "math500.jsonl"
    path.write_bytes(b'{"problem": "p", "answer": "1"}\n{"problem": "\xff"}\n')
    with pytest.raises(DataError, match=r"math500\.jsonl, row 2: not UTF-8"):
        read_benchmark(BENCHMARKS["math500"], path)
    path.write_text('{"problem": "p", "answer"\n')
    with pytest.raises(DataError, match="row 1: not JSON"):
        read_benchmark(BENCHMARKS["math500"], path)
    path.write_text("[1]\n")
    with pytest.raises(DataError, match="row 1: a list"):
        read_benchmark(BENCHMARKS["math500"], path)
    path.write_text("\n")
    with pytest.raises(DataError, match=r"math500\.jsonl: holds no questions"):
        read_benchmark(BENCHMARKS["math500"], path)
    parquet = tmp_path / "math500.parquet"
    parquet.write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        read_benchmark(BENCHMARKS["math500"], parquet)
    with pytest.raises(DataError, match=r"end in \.jsonl or \.parquet"):
        read_benchmark(BENCHMARKS["math500"], tmp_path / "math500.csv")


def test_parquet_of_the_benchmarks_own_layout(tmp_path):
    path = tmp_path / "gsm8k.parquet"
    pq.write_table(pa.table({"question": ["How many?"], "answer": ["work\n#### 1,234"]}), path)
    [question] = read_benchmark(BENCHMARKS["gsm8k"], path)
    assert (question.answer, question.messages[0]["content"]) == ("1234", f"How many?\n{BOXED_INSTRUCTION}")
    pq.write_table(pa.table({"question": ["How many?"], "answer": ["1234"]}), path)
    with pytest.raises(BenchmarkError, match="has no '####'"):
        read_benchmark(BENCHMARKS["gsm8k"], path)


@pytest.mark.parametrize(
    ("value", "text"),
    [(27.0, "27"), (0.5, "0.5"), (-3, "-3"), (" \\pi ", "\\pi"), (["$69$,$84$"], "$69$,$84$"), (["2", 3], "2, 3")],
)
def test_answers_of_any_type_become_text(value, text):
    assert answer_text(value) == text


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("\\boxed{1} then \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\fbox{3}", "3"),
        ("\\boxed{4} and \\boxed{5", "4"),  # the last complete one
        ("\\boxed{1} and \\boxed{3}", "1, 3"),  # boxes of one sentence are one answer
        ("\\boxed{ 10 }\\%", "10"),
    ],
)
def test_the_answer_of_a_solution_is_in_its_last_boxes(text, inside):
    assert answer_of_solution(text) == inside


@pytest.mark.parametrize(
    ("solution", "inside"),
    [
        ("First \\boxed{4}, finally \\framebox{7}.", "7"),
        ("First \\boxed{4}, finally $\\boxed 5$.", "5"),
        ("First \\fbox{4}, finally $\\fbox\n6$.", "6"),
    ],
)
def test_a_reference_is_the_box_that_the_graders_read(solution, inside):
    """Two parsers once disagreed on these: one of them knew neither \\framebox nor a box without braces."""
    assert answer_of_solution(solution) == inside
    assert grade_one(f"\\boxed{{{inside}}}", solution).verdict is Verdict.CORRECT
    assert grade_one("\\boxed{4}", solution).verdict is Verdict.WRONG
    assert grade_one(solution, inside, "dapo_boxed").verdict is Verdict.CORRECT


def test_no_box_is_an_error():
    with pytest.raises(ValueError, match="no complete"):
        answer_of_solution("the answer is 4")
