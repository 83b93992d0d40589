"""Why answers got their verdicts: in the rollout file, in the metrics, and in the error of a step without groups."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny import make_tokenizer

from megatron_nft.config import Config, VerifyConfig
from megatron_nft.data.grouping import classify
from megatron_nft.data.rollout_file import SCHEMA, read_rollout_file, rollout_path, write_rollouts
from megatron_nft.engines.answers import generate_groups
from megatron_nft.engines.end_tokens import EndToken
from megatron_nft.engines.engine import Completion
from megatron_nft.metrics import Metrics
from megatron_nft.train import collect, record
from megatron_nft.train.checkpoints import RunState
from megatron_nft.train.reasons import Outcomes
from megatron_nft.types import Prompt, ReasonKind, Rollout, RolloutGroup, Verdict
from megatron_nft.verify import Graded, Outcome, VerifierPool, grade_one
from megatron_nft.verify.outcome import combine

PROMPT = Prompt(0, "sums", ({"role": "user", "content": "1+1="},), "2", np.array([1, 2], dtype=np.int32))


def group(*answers: tuple[Verdict, ReasonKind | None], said: str = "x", draw: int = 0) -> RolloutGroup:
    one = np.zeros(1, np.float32)
    rollouts = [
        Rollout(
            draw, i, np.array([5], np.int32), one, "stop", 0, "text",
            verdict=verdict, reason=said if kind else "", reason_kind=kind,
        )
        for i, (verdict, kind) in enumerate(answers)
    ]  # fmt: skip
    return RolloutGroup(draw, PROMPT, rollouts, 1)


def raises(response, answer, data_source, extra):
    """Raise what the answer names."""
    raise {"recursion": RecursionError("maximum recursion depth exceeded"), "value": ValueError("bad")}[answer]


RAISES = "test_train_reasons.raises"
U, N, K = Verdict.UNPARSEABLE, Verdict.NO_VERDICT, ReasonKind


@pytest.mark.parametrize(
    ("grader", "response", "answer", "verdict", "kind"),
    [
        ("maths", r"\boxed{2}", "2", Verdict.CORRECT, None),
        ("maths", r"\boxed{3}", "2", Verdict.WRONG, None),
        ("maths", "", "2", U, K.NO_ANSWER),
        ("maths", "nothing to see", "x", U, K.NO_ANSWER),
        ("maths", r"so \boxed{1", "2", U, K.UNFINISHED),
        ("maths", r"<think>\boxed{2}", "2", U, K.UNFINISHED),
        ("maths", r"<think>\boxed{2}</think>", "2", U, K.NO_ANSWER),
        ("maths", r"\boxed{2}", " ", U, K.REFERENCE),
        ("maths", r"\boxed{2}", r"\frac{", U, K.REFERENCE),
        ("maths", r"\boxed{\frac{1}{}}", "2", U, K.OTHER),
        ("dapo_boxed", "2", "2", U, K.NO_ANSWER),
        ("dapo_boxed", r"\boxed{2", "2", U, K.UNFINISHED),
        ("dapo_boxed", r"\boxed{2}", " ", U, K.REFERENCE),
        ("dapo_minerva", "2", "2", U, K.NO_ANSWER),
        ("dapo_minerva", "<think>Answer: 2", "2", U, K.UNFINISHED),
        ("numeric", r"\boxed{2}", "x", U, K.REFERENCE),
        ("numeric", r"\boxed{x}", "2", U, K.OTHER),
        ("math_verify_plain", "no idea", "2", U, K.NO_ANSWER),
        ("math_verify_plain", r"\boxed{2}", "", U, K.REFERENCE),
        ("math_verify_plain", r"\boxed{2", "2", U, K.UNFINISHED),
        (RAISES, "x", "value", N, K.GRADER_FAILED),
        (RAISES, "x", "recursion", N, K.GRADER_FAILED),
        (RAISES, "x", "an answer that it does not know", N, K.GRADER_FAILED),
    ],
)
def test_every_grader_names_the_kind_of_its_reason(grader, response, answer, verdict, kind):
    graded = grade_one(response, answer, grader)
    assert (graded.verdict, graded.reason_kind) == (verdict, kind)
    assert bool(graded.reason) == (kind is not None)


@pytest.mark.parametrize(
    ("response", "verdict", "kind"),
    [
        ("sleep 30", Verdict.TIMEOUT, K.TIMEOUT),
        (f"memory {1 << 30}", Verdict.TIMEOUT, K.MEMORY),
        ("segfault", N, K.GRADER_FAILED),
        ("exit 3", N, K.GRADER_FAILED),
        ("raise", N, K.GRADER_FAILED),
        ("nonsense", N, K.GRADER_FAILED),
        ("verdict unparseable", U, K.OTHER),
        ("verdict no_verdict", N, K.OTHER),
        ("no", Verdict.WRONG, None),
    ],
)
def test_the_pool_knows_the_kind_of_what_it_sees(response, verdict, kind):
    settings = VerifyConfig(grader="verify_graders.act", timeout_s=1.0, memory_bytes=200 << 20)
    with VerifierPool(settings) as pool:
        graded = pool.submit(response, "yes").result(60)
    assert (graded.verdict, graded.reason_kind) == (verdict, kind)
    assert graded.ignored is verdict.is_missing


@pytest.mark.parametrize(
    ("verdicts", "on_disagreement", "on_failure", "ignored"),
    [
        ("timeout", "trust_first", "drop", True),
        ("timeout", "trust_first", "negative", False),
        ("no_verdict", "trust_first", "drop", True),
        ("no_verdict", "trust_first", "negative", False),
        ("unparseable", "trust_first", "drop", False),  # the answer's own fault
        ("wrong", "trust_first", "drop", False),
        ("correct no_verdict", "drop", "drop", False),  # the second grader says nothing, so it does not disagree
        ("correct timeout", "drop", "drop", False),
        ("wrong timeout", "not_negative", "negative", False),
        ("no_verdict correct", "trust_first", "negative", False),
        ("no_verdict correct", "not_negative", "negative", True),
        ("no_verdict wrong", "drop", "negative", False),
        ("correct timeout wrong", "drop", "drop", True),
    ],
)
def test_what_has_no_verdict_is_left_out_or_wrong(verdicts, on_disagreement, on_failure, ignored):
    outcomes = [Outcome(Verdict(v)) for v in verdicts.split()]
    names = tuple(f"g{i}" for i in range(len(outcomes)))
    assert combine(names, outcomes, 0.0, on_disagreement, on_failure).ignored is ignored


def test_the_rate_is_that_of_the_answers_with_a_verdict():
    answers = [(Verdict.CORRECT, None), (Verdict.WRONG, None), (N, K.GRADER_FAILED), (Verdict.TIMEOUT, K.TIMEOUT)]
    found = group(*answers)
    for rollout in found.rollouts[2:]:
        rollout.ignored = True
    assert (found.correct_rate, classify(found)) == (0.5, "kept")
    found.rollouts[1].ignored = True
    assert classify(found) == "too_few"  # one answer is left
    metrics = Metrics()
    record.add_rollouts(metrics, [found], 0.0)
    merged = Metrics.merge([metrics.state()])
    assert {n: merged[f"verdict/{n}"] for n in ("correct", "timeout", "no_verdict")} == {
        "correct": 0.25, "timeout": 0.25, "no_verdict": 0.5,
    }  # fmt: skip


def failing_grader(response, answer, data_source, extra):
    raise RuntimeError("no such table")


FAILS = "test_train_reasons.failing_grader"


class Script:
    """An engine that gives the same four answers to every question, the last one cut off."""

    weight_version = 0

    def generate(self, requests, sampling, on_wait=None):
        self.sampling = sampling
        tokenizer = make_tokenizer()
        for i in range(len(requests)):
            for sample, text in enumerate((r"\boxed{2}", r"\boxed{3}", "\n", r"\boxed{2")):
                ids = np.array(tokenizer.encode(text), dtype=np.int32)
                reason = "length" if sample == 3 else "stop"
                yield i, sample, Completion(ids, np.zeros(len(ids), dtype=np.float32), reason, 0)


def settings(tmp_path, **changes):
    return Config(
        run_dir=tmp_path,
        model={"path": tmp_path},
        data={"train": [tmp_path]},
        rollout={"answers_per_question": 4, "questions_per_batch": 2, "max_generation_batches": 2},
        train={"questions_per_step": 8, "questions_per_optimizer_step": 8},
        **changes,
    )


@pytest.mark.parametrize(
    ("grader", "groups"),
    [
        ("maths", [None, None, "no_answer", "cut_off"]),
        ("dapo_boxed", [None, None, "no_answer", "cut_off"]),
        (FAILS, ["grader_failed"] * 3 + ["cut_off"]),
    ],
)
def test_graders_leave_their_reason_with_every_answer(tmp_path, grader, groups):
    config, engine = settings(tmp_path, verify={"grader": grader}), Script()
    options = {"step": 1, "weight_version": 0, "tokenizer": make_tokenizer(), "stop_token_ids": [9]}
    with VerifierPool(config.verify) as pool:
        (found,), _ = generate_groups(engine, [(0, PROMPT)], config, pool, **options)
    assert engine.sampling.stop_token_ids == (9,)
    assert [r.reason_kind for r in found.rollouts] == groups
    path = rollout_path(tmp_path, 1, 0)
    write_rollouts(path, [found], ["all_wrong"], step=1)
    table = read_rollout_file(path, ["reason", "reason_kind"])
    assert table.column("reason").to_pylist() == [r.reason for r in found.rollouts]
    assert table.column("reason_kind").to_pylist() == groups
    metrics = Metrics()
    record.add_rollouts(metrics, [found], 0.0)
    merged = Metrics.merge([metrics.state()])
    assert {name: merged[f"reason/{name}"] for name in ReasonKind} == {n: groups.count(n) for n in ReasonKind}


@pytest.mark.parametrize("opens", [False, True])
def test_graders_and_the_file_learn_that_a_prompt_opens_the_thinking(tmp_path, opens):
    asked = []

    class Noting:
        def submit(self, response, answer, data_source, extra, *, prompt_opens_thinking):
            asked.append((extra, prompt_opens_thinking))
            future = Future()
            future.set_result(Graded(Verdict.WRONG, None, "g", 0.0, {}, False, "why"))
            return future

    prompt = replace(PROMPT, opens_thinking=opens, extra={"index": 1})
    options = {"step": 1, "weight_version": 0, "tokenizer": make_tokenizer()}
    (found,), _ = generate_groups(Script(), [(0, prompt)], settings(tmp_path), Noting(), **options)
    assert asked == [({"index": 1}, opens)] * 3  # one is cut off
    path = tmp_path / "rank_00000.parquet"
    write_rollouts(path, [found], ["all_wrong"], step=1)
    assert read_rollout_file(path).column("prompt_opens_thinking").to_pylist() == [opens] * 4


def test_files_of_earlier_versions_lack_the_column_and_are_read(tmp_path):
    path = tmp_path / "rank_00000.parquet"
    write_rollouts(path, [group((Verdict.WRONG, K.OTHER))], ["trained"], step=1)
    pq.write_table(pq.read_table(path).drop_columns(["reason", "reason_kind", "prompt_opens_thinking"]), path)
    table = read_rollout_file(path)
    assert table.schema.names == SCHEMA.names and table.column("reason").to_pylist() == [None]
    assert read_rollout_file(path, ["reason", "verdict"]).to_pylist() == [{"reason": None, "verdict": "wrong"}]
    assert read_rollout_file(path, ["verdict"]).to_pylist() == [{"verdict": "wrong"}]


FAILED = (N, K.GRADER_FAILED)
CUT = (Verdict.WRONG, K.CUT_OFF)
OPEN = (U, K.UNFINISHED)
WRONG = (Verdict.WRONG, None)
SLOW = (Verdict.TIMEOUT, K.TIMEOUT)
LARGE = (Verdict.TIMEOUT, K.MEMORY)
NONE = (U, K.NO_ANSWER)
REFERENCE = (U, K.REFERENCE)


@pytest.mark.parametrize(
    ("answers", "said", "not_said"),
    [
        ([WRONG] * 4, "4 answers: 4 wrong. A group is kept when", "reasons"),
        ([FAILED] * 4, "4 no verdict (reasons: 4 grader failed). Grading failed", "nearer to what"),
        ([FAILED] * 4, "the grader failed: ValueError: bad answer. Mend the grader", "\n"),
        ([SLOW] * 3 + [WRONG], "1 wrong, 3 timeout (reasons: 3 timeout). Grading took too long", "nearer to what"),
        ([NONE] * 3 + [WRONG], "The grader found no answer in the texts", "nearer to what"),
        ([REFERENCE] * 4, "The reference answers cannot be used", "nearer to what"),
        ([CUT] * 3 + [WRONG], "4 wrong (reasons: 3 cut off). Most answers were cut off", "nearer to what"),
        ([NONE, WRONG, WRONG, WRONG], "(reasons: 1 no answer). A group is kept when", "Mend"),
        # Two causes of half each, or one cause under two names.
        ([CUT, CUT, OPEN, OPEN], "Most answers were cut off, or end within their thinking", "nearer to what"),
        ([CUT, OPEN, WRONG, WRONG], "Most answers were cut off, or end within their thinking", "nearer to what"),
        ([SLOW, SLOW, NONE, NONE], "Grading took too long", "nearer to what"),
        ([SLOW, SLOW, NONE, NONE], "The grader found no answer in the texts", "nearer to what"),
        ([FAILED, FAILED, CUT, OPEN], "Mend the grader (verify.grader). Most answers were cut off", "nearer to what"),
        ([SLOW, LARGE, WRONG, WRONG], "or verify.workers. Grading needed too much memory", "nearer"),
        ([REFERENCE, REFERENCE, WRONG, WRONG], "The reference answers cannot be used", "nearer to what"),
        ([NONE] * 3 + [SLOW], "The grader found no answer in the texts", "took too long"),
    ],
)
def test_the_error_counts_verdicts_and_reasons(answers, said, not_said):
    outcomes = Outcomes.of([group(*answers, said="the grader failed: ValueError: bad\nanswer")])
    text = record.why_empty(0, 4, 3, Counter(all_wrong=1), outcomes)
    assert text.startswith("0 of 4 groups were kept after 3 generation batches")
    assert said in text and not_said not in text


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([FAILED] * 3 + [WRONG], "75% of the step's answers have no verdict, more than verify.max_failure_share=0.2: "),
        ([FAILED] * 3 + [WRONG], "the grader failed: ValueError: bad answer. Mend the grader (verify.grader)"),
        ([SLOW, CUT, CUT, CUT], "25% of the step's answers"),
        ([SLOW, CUT, CUT, CUT], "Grading took too long: raise verify.timeout_s or verify.workers"),
        (
            [LARGE] * 2 + [NONE] * 2,
            "2 unparseable, 2 timeout (reasons: 2 memory, 2 no answer). Grading needed too much",
        ),
        ([(N, K.OTHER)] * 4, "(reasons: 4 other)."),
    ],
)
def test_the_error_of_too_many_failures_is_about_them_alone(answers, said):
    text = record.why_stopped(Outcomes.of([group(*answers, said="the grader failed: ValueError: bad\nanswer")]), 0.2)
    assert said in text and "cut off, or" not in text and text == text.strip() and "\n" not in text


class Ranks:
    """One rank without process groups."""

    rank, world_size, is_replica_leader, world_gloo = 0, 1, True, None


class Endless:
    """An engine whose answers never end."""

    weight_version = 0

    def generate(self, requests, sampling, on_wait=None):
        for i in range(len(requests)):
            for sample in range(4):
                yield i, sample, Completion(np.array([5], np.int32), np.zeros(1, np.float32), "length", 0)


def failing_step(tmp_path, monkeypatch, engine, config, error):
    """Collect a step of one rank that fails with `error`; its message and the rollouts that it left."""
    monkeypatch.setattr(collect, "gather_objects", lambda value, _: [value])
    stream = SimpleNamespace(cursor=0, draw=lambda n: [(i, PROMPT) for i in range(n)])
    options = {"step": 1, "weight_version": 0, "tokenizer": make_tokenizer()}
    with VerifierPool(config.verify) as pool, pytest.raises(error) as raised:
        collect.collect(
            lambda draws: generate_groups(engine, draws, config, pool, **options)[0],
            RunState(step=0, weight_version=0, cursor=0, surplus=()),
            1,
            Metrics(),
            config=config,
            layout=Ranks(),
            stream=stream,
            algorithm=SimpleNamespace(samples=lambda _: []),
            rounds=SimpleNamespace(wait_for_all=lambda: 0),
            end_tokens=(EndToken(258, "<|im_end|>", ("tokenizer",)),),
        )
    return str(raised.value), read_rollout_file(rollout_path(tmp_path, 1, 0))


@pytest.mark.parametrize(
    ("engine", "verify", "said"),
    [
        (Script(), {"grader": FAILS, "max_failure_share": 1}, "RuntimeError: no such table. Mend the grader"),
        (Endless(), {}, "100% of the answers were cut off at 3584 tokens"),
    ],
)
def test_the_rollouts_of_a_step_that_fails_are_on_disk_before_the_error(tmp_path, monkeypatch, engine, verify, said):
    message, table = failing_step(
        tmp_path, monkeypatch, engine, settings(tmp_path, verify=verify), collect.EmptyBatchError
    )
    assert said in message and "\n" not in message
    assert table.num_rows == 2 * 2 * 4
    assert set(table.column("fate").to_pylist()) == ({"all_wrong"} if not verify else {"too_few", "ignored"})
    assert all(table.column("reason").to_pylist())


@pytest.mark.parametrize(
    ("verify", "ignored"),
    [({}, 3), ({"max_failure_share": 0.74}, 3), ({"on_failure": "negative"}, 0), ({"max_failure_share": 0}, 3)],
)
def test_too_many_answers_without_a_verdict_stop_the_run(tmp_path, monkeypatch, verify, ignored):
    """Three of four answers are graded, by a grader that raises; nothing more is generated than the first batch."""
    config = settings(tmp_path, verify={"grader": FAILS, **verify})
    message, table = failing_step(tmp_path, monkeypatch, Script(), config, collect.GradingError)
    assert message.startswith("75% of the step's answers have no verdict") and "no such table" in message
    assert table.column("verdict").to_pylist() == (["no_verdict"] * 3 + ["wrong"]) * 2
    assert table.column("fate").to_pylist().count("ignored") == 2 * ignored
