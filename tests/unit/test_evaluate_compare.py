"""Two evaluations side by side: figures by hand, refusals, and what is printed."""

import json

import pytest

from megatron_nft import cli
from megatron_nft.data.benchmarks import Question
from megatron_nft.evaluate.compare import compare, verdict
from megatron_nft.evaluate.evaluation import EvaluationError, answer_path, make_results
from megatron_nft.evaluate.model_folder import ModelIdentity
from megatron_nft.evaluate.protocol import Sampling, build_protocol, describe_benchmark
from megatron_nft.evaluate.questions import Answer, QuestionResult
from megatron_nft.evaluate.records import AnswerFile
from megatron_nft.evaluate.tasks import Task, make_prompts
from megatron_nft.files import write_atomically
from megatron_nft.types import Verdict


class Bytes:
    """A tokenizer without a chat template."""

    chat_template = None

    def __call__(self, texts, add_special_tokens):
        return {"input_ids": [list(t.encode()) for t in texts]}


def write_evaluation(folder, scores, *, name="aime24", samples=4, temperature=0.6, checksum="a"):
    """An evaluation folder whose question i has scores[i] correct answers of `samples`."""
    questions = [
        Question(f"q{i}", ({"role": "user", "content": f"What is {i}+{i}?"},), str(2 * i), "sums")
        for i in range(len(scores))
    ]
    task = Task(name, name, questions, samples)
    prompts = {name: make_prompts(task, Bytes(), None)}
    answers = [
        QuestionResult(
            i,
            "sums",
            [
                Answer("t", 5, "stop", v, "1", {"maths": v})
                for v in [Verdict.CORRECT] * right + [Verdict.WRONG] * (samples - right)
            ],
        )
        for i, right in enumerate(scores)
    ]
    with AnswerFile(answer_path(folder, name), len(questions), samples) as file:
        for q, r in zip(questions, answers):
            file.append(r, id=q.id, prompt=q.messages[0]["content"], answer=q.answer)
    protocol = build_protocol(
        preset="nft-7b",
        benchmarks={name: describe_benchmark(questions, samples)},
        sampling=Sampling(temperature, 0.7, 512, 3584, 0),
        prompt={},
        grading={},
        model=ModelIdentity(f"/models/{checksum}", checksum, 1, 4096),
        engine={},
        versions={},
    )
    results = make_results([task], prompts, {name: answers}, protocol)
    write_atomically(folder / "results.json", json.dumps(results))
    return folder


def said(comparison):
    return verdict(comparison.paired.difference.mean, comparison.p_corrected)


def test_difference_and_changed_questions_by_hand(tmp_path):
    a = write_evaluation(tmp_path / "a", [4, 2, 0, 1])
    b = write_evaluation(tmp_path / "b", [4, 3, 4, 0], checksum="b")
    [c], average, differ = compare(a, b)
    assert (c.a, c.b, c.questions) == (7 / 16, 11 / 16, 4)
    assert c.paired.difference.mean == pytest.approx(0.25)
    assert [(x.id, x.a, x.b) for x in c.changes] == [("q2", 0.0, 1.0), ("q1", 0.5, 0.75), ("q3", 0.25, 0.0)]
    assert average is None
    assert differ == []
    assert said(c) == "no difference can be told"  # four questions


def test_clear_differences_are_told_both_ways(tmp_path):
    a = write_evaluation(tmp_path / "a", [1, 0, 2, 1] * 10)
    b = write_evaluation(tmp_path / "b", [2, 1, 2, 2] * 10)
    assert said(compare(a, b)[0][0]) == "B is better"
    assert said(compare(b, a)[0][0]) == "B is worse"
    assert compare(a, a)[0][0].changes == []


def write_several(folder, scores):
    """An evaluation of several benchmarks, scores by name."""
    merged = None
    for name, right in scores.items():
        write_evaluation(folder, right, name=name)
        one = json.loads((folder / "results.json").read_text())
        if merged is not None:
            one["benchmarks"] |= merged["benchmarks"]
            one["protocol"]["benchmarks"] |= merged["protocol"]["benchmarks"]
        merged = one
    (folder / "results.json").write_text(json.dumps(merged))
    return folder


def test_average_over_two_benchmarks(tmp_path):
    a = write_several(tmp_path / "a", {"aime24": [0] * 6, "amc23": [4] * 6})
    b = write_several(tmp_path / "b", {"aime24": [4] * 6, "amc23": [4] * 6})
    comparisons, average, _ = compare(a, b)
    assert {c.name for c in comparisons} == {"aime24", "amc23"}
    assert (average["a"], average["b"]) == (0.5, 1.0)
    # Six differences of 1 and one more of 0: variance 6/7 / 6 = 1/7, standard error sqrt(1/42), 5 degrees; halved.
    half = 2.5706 * (1 / 42) ** 0.5 / 2
    d = average["paired"].difference
    assert (d.mean, d.low, d.high) == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=1e-4)


def test_what_is_said_of_a_benchmark_is_corrected_for_their_number(tmp_path, capsys):
    """One of five benchmarks differs with p = 0.03, which is nothing to be surprised at among five."""
    names = ["aime24", "aime25", "amc23", "math500", "minerva"]
    better = [1, 1, 1, 1, 1, 1] + [0] * 24
    a = write_several(tmp_path / "a", dict.fromkeys(names, [0] * 30))
    b = write_several(tmp_path / "b", dict.fromkeys(names, [0] * 30) | {"amc23": better})
    found = {c.name: c for c in compare(a, b)[0]}["amc23"]
    assert 0.005 < found.paired.p_value < 0.05 and found.paired.difference.low > 0
    assert found.p_corrected == pytest.approx(5 * found.paired.p_value)
    assert said(found) == "no difference can be told"
    assert cli.main(["compare", str(a), str(b), "--show", "0", "--out", str(tmp_path / "c.json")]) == 0
    shown = capsys.readouterr().out
    assert "p of 5" in shown and "corrected for 5 benchmarks (Holm)" in shown and "several seeds of each" in shown
    written = json.loads((tmp_path / "c.json").read_text())
    assert written["benchmarks"]["amc23"]["verdict"] == "no difference can be told"
    assert written["benchmarks"]["amc23"]["p_corrected"] == found.p_corrected
    assert "another seed" in written["note"]
    alone = [write_evaluation(tmp_path / f"{x}1", scores) for x, scores in (("a", [0] * 30), ("b", better))]
    assert said(compare(*alone)[0][0]) == "B is better"
    assert cli.main(["compare", *map(str, alone)]) == 0
    shown = capsys.readouterr().out
    assert "Holm" not in shown and "several seeds of each" in shown


def test_another_protocol_is_refused_until_told(tmp_path, capsys):
    a = write_evaluation(tmp_path / "a", [1, 2])
    b = write_evaluation(tmp_path / "b", [2, 2], temperature=1.0)
    with pytest.raises(EvaluationError, match=r"(?s)allow-different.*sampling\.temperature: 0\.6 against 1\.0"):
        compare(a, b)
    assert cli.main(["compare", str(a), str(b)]) == 2
    assert "sampling.temperature: 0.6 against 1.0" in capsys.readouterr().err
    assert cli.main(["compare", str(a), str(b), "--allow-different"]) == 0
    out = capsys.readouterr().out
    assert "the protocols differ" in out
    assert "37.5  50.0  +12.5" in out


def test_what_is_no_finished_evaluation(tmp_path):
    a = write_evaluation(tmp_path / "a", [1, 2])
    with pytest.raises(EvaluationError, match="so it is no evaluation"):
        compare(a, tmp_path)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "protocol.json").write_text("{}")
    with pytest.raises(EvaluationError, match="is not finished"):
        compare(a, tmp_path / "b")
    (tmp_path / "b" / "results.json").write_text('{"format": 99}')
    with pytest.raises(EvaluationError, match="has format 99, this version reads 1"):
        compare(a, tmp_path / "b")
    (tmp_path / "b" / "results.json").write_text('{"format": 1,')
    with pytest.raises(EvaluationError, match="is damaged"):
        compare(a, tmp_path / "b")
    other = write_evaluation(tmp_path / "c", [1, 2], name="amc23")
    with pytest.raises(EvaluationError, match="no benchmark in common"):
        compare(a, other)


def test_everything_goes_to_the_file(tmp_path, capsys):
    a, b = write_evaluation(tmp_path / "a", [0, 1, 0]), write_evaluation(tmp_path / "b", [4, 1, 0])
    assert cli.main(["compare", str(a), str(b), "--out", str(tmp_path / "c.json"), "--show", "0"]) == 0
    assert "1 questions gained, 0 lost" in capsys.readouterr().out
    written = json.loads((tmp_path / "c.json").read_text())
    assert written["benchmarks"]["aime24"]["changes"] == [
        {"id": "q0", "prompt": "What is 0+0?", "answer": "0", "a": 0.0, "b": 1.0}
    ]
    assert written["benchmarks"]["aime24"]["paired"]["difference"]["mean"] == pytest.approx(1 / 3)
