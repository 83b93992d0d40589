"""`megatron-nft eval` with real engines: whole, interrupted, killed, and refused."""

import json
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny import make_model

from megatron_nft import cli
from megatron_nft.engines import open as create
from megatron_nft.engines.engine import EngineError
from megatron_nft.evaluate.records import read_answers
from megatron_nft.verify.graders import RULES

NUM_QUESTIONS = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "m", layers=1, hidden=32)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A question file in verl's layout; lengths differ, so that the engine answers in an order of its own."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": f"What is {'9' * (NUM_QUESTIONS - i)} + 1?"}],
            "reward_model": {"style": "rule", "ground_truth": str(10 ** (NUM_QUESTIONS - i))},
            "extra_info": {"index": i},
        }
        for i in range(NUM_QUESTIONS)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def arguments(model, questions, out, *more):
    given = ["eval", "--model", model, "--benchmarks", questions, "--out", out, "--engine", "embedded"]
    given += ["--samples", "3", "--max-response-tokens", "20", "--grader", "maths", *more]
    return [str(a) for a in given]


def answers_of(out):
    """{question: [texts]} as they stand in the answer file."""
    return {r.result.index: [a.text for a in r.result.answers] for _, r in read_answers(out / "answers" / "sums.jsonl")}


@pytest.fixture(scope="module")
def whole(model, questions, tmp_path_factory):
    """An evaluation that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    assert cli.main(arguments(model, questions, out)) == 0
    return out


def test_results_hold_every_answer_and_setting(whole, model, capsys, questions):
    results = json.loads((whole / "results.json").read_text())
    figures = results["benchmarks"]["sums"]
    assert (figures["questions"], figures["samples"]) == (NUM_QUESTIONS, 3)
    assert set(figures["pass_at"]) == {"1", "2", "3"}
    assert sum(figures["verdict_shares"].values()) == pytest.approx(1)
    found = answers_of(whole)
    assert sorted(found) == list(range(NUM_QUESTIONS))
    assert all(len(texts) == 3 for texts in found.values())
    assert len({t for texts in found.values() for t in texts}) > NUM_QUESTIONS  # sampled, not one answer over and over
    protocol = results["protocol"]
    assert protocol["sampling"] == {
        "temperature": 0.6, "top_p": 0.7, "max_prompt_tokens": 512, "max_response_tokens": 20, "seed": 0,
    }  # fmt: skip
    assert protocol["grading"]["rules"] == RULES
    assert protocol == json.loads((whole / "protocol.json").read_text())
    markdown, page = (whole / "results.md").read_text(), (whole / "results.html").read_text()
    assert protocol["protocol_hash"] in markdown
    assert protocol["protocol_hash"] in page
    assert "| sums (avg@3) | 8 | 3 |" in markdown
    assert cli.main([*arguments(model, questions, whole), "--dry-run"]) == 0
    assert "sampling.temperature: 0.6" in capsys.readouterr().out


@pytest.mark.parametrize("more", [["--dry-run"], []])
def test_answers_that_the_model_has_no_room_for_are_refused_at_once(model, questions, tmp_path, capsys, more):
    out = tmp_path / "out"
    assert cli.main([*arguments(model, questions, out), "--max-response-tokens", "5000", *more]) == 2
    assert "more than the model's" in capsys.readouterr().err and not out.exists()


def test_a_finished_evaluation_asks_nothing_again(whole, model, questions, monkeypatch):
    before = (whole / "results.json").read_bytes()
    monkeypatch.setattr(create, "open_engine", lambda *_, **__: pytest.fail("the engine was started"))
    assert cli.main(arguments(model, questions, whole)) == 0
    assert (whole / "results.json").read_bytes() == before


def test_an_engine_that_dies_costs_only_what_was_under_way(whole, model, questions, tmp_path, monkeypatch, capsys):
    opened = create.open_engine

    def dying(*args, **kwargs):
        engine = opened(*args, **kwargs)
        generate = engine.generate

        def few(requests, sampling, on_wait=None):
            for n, answer in enumerate(generate(requests, sampling, on_wait)):
                if n == 14:
                    raise EngineError("server died with exit code -9")
                yield answer

        engine.generate = few
        return engine

    small = "rollout.embedded_batch_tokens=200"  # a question at a time
    monkeypatch.setattr(create, "open_engine", dying)
    assert cli.main(arguments(model, questions, tmp_path, small)) == 1
    error = capsys.readouterr().err
    assert "server died with exit code -9" in error
    assert "run the same command again" in error
    kept = answers_of(tmp_path)
    assert 0 < len(kept) <= 14 // 3
    assert not (tmp_path / "results.json").exists()
    monkeypatch.setattr(create, "open_engine", opened)
    assert cli.main(arguments(model, questions, tmp_path, small)) == 0
    assert answers_of(tmp_path) == answers_of(whole)  # the same seeds: as if nothing had happened
    assert list(answers_of(tmp_path))[: len(kept)] == list(kept)


@contextmanager
def started(args):
    """The command as a process of its own, which does not outlive the block."""
    command = [sys.executable, "-m", "megatron_nft", *args]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_answers(process, out, number):
    """Until that many questions are on disk; the process must be at work still."""
    path, deadline = out / "answers" / "sums.jsonl", time.monotonic() + 300
    while not path.exists() or path.read_bytes().count(b"\n") < number:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(pid):
    return {int(p) for t in Path(f"/proc/{pid}/task").glob("*/children") for p in t.read_text().split()}


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_evaluation_goes_on(model, questions, tmp_path, sent):
    slow = ["rollout.embedded_batch_tokens=200", "--max-response-tokens", "150"]  # one answer at a time
    with started(arguments(model, questions, tmp_path, *slow)) as process:
        wait_for_answers(process, tmp_path, 1)
        below = children(process.pid)
        assert below  # the graders
        process.send_signal(sent)
        process.wait(120)
        error = process.stderr.read().decode()
    assert process.returncode == (130 if sent == signal.SIGTERM else -9)
    if sent == signal.SIGTERM:
        assert "interrupted; run the same command again" in error
    deadline = time.monotonic() + 60
    while any(map(_alive, below)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_alive, below))
    first = answers_of(tmp_path)
    assert 1 <= len(first) < NUM_QUESTIONS
    with (tmp_path / "answers" / "sums.jsonl").open("ab") as f:
        f.write(b'{"index": 5, "ans')  # what a kill in the middle of a write leaves
    assert cli.main(arguments(model, questions, tmp_path, *slow)) == 0
    after = answers_of(tmp_path)
    assert len(after) == NUM_QUESTIONS
    assert {i: after[i] for i in first} == first


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_two_at_once_in_one_folder_are_refused(whole, model, questions, capsys):
    import fcntl

    with (whole / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert cli.main(arguments(model, questions, whole)) == 2
    assert "another evaluation is writing to" in capsys.readouterr().err


def test_other_settings_in_the_same_folder_are_refused(whole, model, questions, capsys):
    assert cli.main(arguments(model, questions, whole, "--temperature", "1.0", "--seed", "3")) == 2
    error = capsys.readouterr().err
    assert "sampling.temperature: 0.6 against 1.0" in error
    assert "sampling.seed: 0 against 3" in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--benchmarks", "aime24,aime23"], "unknown benchmark 'aime23'; known are aime24, aime25, amc23, math500"),
        (["--model", "no-such-folder"], "model folder no-such-folder does not exist"),
        (["--samples", "0"], "--samples is 0; it must be at least 1"),
        (["--top-p", "0"], "--top-p is 0.0; it must be in (0, 1]"),
        (
            ["--max-response-tokens", "9000"],
            "that is more than the model's 2048 positions; lower --max-response-tokens",
        ),
        (["--max-prompt-tokens", "1", "--max-response-tokens", "9"], "leaves no room for an answer"),
        (["--grader", "mathverify"], "unknown grader 'mathverify'"),
        (["rollout.temperature=2"], "override 'rollout.temperature=2': eval takes"),
        (["rollout.server.port=2"], "rollout.server.port: unknown key"),
    ],
)
def test_bad_input_is_named_before_anything_is_asked(model, questions, tmp_path, capsys, changes, message):
    assert cli.main([*arguments(model, questions, tmp_path), *changes]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()


def test_long_prompts_are_asked_whole_with_a_shorter_answer(model, questions, tmp_path):
    """max_prompt_tokens + max_response_tokens bounds the whole; only the longest prompts leave less for the answer."""
    texts = [f"What is {'9' * (NUM_QUESTIONS - i)} + 1?" for i in range(NUM_QUESTIONS)]
    prompts = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in texts]
    special = len("<|im_start|>") * 2 + len("<|im_end|>") - 3  # one token per byte, three special tokens
    lengths = [len(p) - special for p in prompts]
    limit = max(lengths) - 3  # three questions are longer, by 1 to 3
    assert cli.main([*arguments(model, questions, tmp_path), "--max-prompt-tokens", str(limit)]) == 0
    figures = json.loads((tmp_path / "results.json").read_text())["benchmarks"]["sums"]
    assert figures["over_long_prompts"] == 3
    longest = {
        record.result.index: max(a.num_tokens for a in record.result.answers)
        for _, record in read_answers(tmp_path / "answers" / "sums.jsonl")
    }
    assert all(longest[i] <= min(20, limit + 20 - lengths[i]) for i in range(NUM_QUESTIONS))
    assert longest[0] == 17  # a random model does not end by itself here


def test_a_real_sglang_server(sglang_engine, sglang_model, model, questions, tmp_path, capsys):
    url = sglang_engine.urls[0]
    args = [*arguments(sglang_model, questions, tmp_path), "--engine", "sglang", "--url", url, "--temperature", "0"]
    assert cli.main(args) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["protocol"]["engine"]["version"].startswith("sglang 0.5.")
    served = answers_of(tmp_path)
    embedded = tmp_path / "embedded"
    assert cli.main([*arguments(sglang_model, questions, embedded), "--temperature", "0"]) == 0
    assert answers_of(embedded) == served  # greedy, fp32: the engines agree to the letter
    other = [*arguments(model, questions, tmp_path / "other"), "--engine", "sglang", "--url", url]
    assert cli.main(other) == 2
    assert f"the server at {url} serves {sglang_model}, not {model}" in capsys.readouterr().err
