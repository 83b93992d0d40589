"""Answer files: everything comes back, a killed writer costs one question, damage is named."""

import json

import pytest

from megatron_nft.evaluate.questions import Answer, QuestionResult
from megatron_nft.evaluate.records import AnswerFile, RecordError, grader_names, read_answers
from megatron_nft.types import Verdict


def result(index, *texts):
    answers = [
        Answer(t, len(t), "stop", Verdict.WRONG, None, {"maths": Verdict.WRONG, "numeric": Verdict.CORRECT}, 0.25)
        for t in texts
    ]
    return QuestionResult(index, "sums", answers)


def fill(path, results, **kwargs):
    with AnswerFile(path, num_questions=5, samples=2) as file:
        for r in results:
            file.append(r, id=f"q{r.index}", prompt="1+1?", answer="2", **kwargs)
    return path


def test_answers_come_back(tmp_path):
    path = fill(tmp_path / "a.jsonl", [result(3, "x", "line\u2028separator\n"), result(1, "\u221a2", "")])
    file = AnswerFile(path, 5, 2)
    assert file.results() == [result(1, "\u221a2", ""), result(3, "x", "line\u2028separator\n")]
    assert [(n, r.id, r.prompt, r.answer) for n, r in read_answers(path)] == [
        (1, "q3", "1+1?", "2"),
        (2, "q1", "1+1?", "2"),
    ]
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2  # also for readers that split at U+2028
    assert grader_names(file.results()) == ["maths", "numeric"]


def test_answers_graded_under_a_former_name_go_on_under_the_new_one(tmp_path):
    """The default grader was called `math_verify` once; a folder that was begun then holds one grader, not two."""
    path = fill(tmp_path / "a.jsonl", [result(0, "x", "y")])
    path.write_text(path.read_text(encoding="utf-8").replace('"maths"', '"math_verify"'), encoding="utf-8")
    with AnswerFile(path, 5, 2) as file:
        file.append(result(1, "z", ""), id="q1", prompt="1+1?", answer="2")
    assert grader_names(AnswerFile(path, 5, 2).results()) == ["maths", "numeric"]


def test_characters_that_utf8_cannot_hold_do_not_lose_the_row(tmp_path):
    path = fill(tmp_path / "a.jsonl", [result(0, "bad \ud800", "ok")])
    [(_, record)] = read_answers(path)
    assert record.result.answers[0].text == "bad ?"


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_an_unfinished_line_is_asked_again(tmp_path, cut):
    path = fill(tmp_path / "a.jsonl", [result(0, "a", "b"), result(1, "c", "d")])
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    file = AnswerFile(path, 5, 2)
    assert sorted(file.done) == [0]
    with file:
        file.append(result(1, "c", "d"), id="q1", prompt="1+1?", answer="2")
    assert path.read_bytes() == whole


def test_damage_and_foreign_files_are_named(tmp_path):
    path = fill(tmp_path / "a.jsonl", [result(0, "a", "b")])
    good = path.read_text()
    path.write_text("{}\n" + good)
    with pytest.raises(RecordError, match=r"a\.jsonl, line 1: not an answer record"):
        AnswerFile(path, 5, 2)
    path.write_bytes(good.encode() + b"\xff\xfe\n")
    with pytest.raises(RecordError, match="line 2"):
        AnswerFile(path, 5, 2)
    path.write_text(good.replace('"wrong"', '"right"', 1))
    with pytest.raises(RecordError, match="'right' is not a valid Verdict"):
        AnswerFile(path, 5, 2)
    path.write_text(good)
    with pytest.raises(RecordError, match="does not belong to 5 questions with 3 answers"):
        AnswerFile(path, 5, 3)


def test_every_line_is_plain_json(tmp_path):
    path = fill(tmp_path / "a.jsonl", [result(2, "a", "b")])
    line = json.loads(path.read_text())
    assert (line["index"], line["id"], line["answers"][0]["text"], line["answers"][0]["verify_s"]) == (
        2,
        "q2",
        "a",
        0.25,
    )
