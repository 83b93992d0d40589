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

from megatron_nft.config import Config
from megatron_nft.data.rollout_file import SCHEMA, read_rollout_file, rollout_path, write_rollouts
from megatron_nft.engines.answers import CUT_OFF, generate_groups
from megatron_nft.engines.end_tokens import EndToken
from megatron_nft.engines.engine import Completion
from megatron_nft.metrics import Metrics
from megatron_nft.train import collect, record
from megatron_nft.train.checkpoints import RunState
from megatron_nft.train.reasons import REASONS, Outcomes, reason_group
from megatron_nft.types import Prompt, Rollout, RolloutGroup, Verdict
from megatron_nft.verify import Graded, VerifierPool

PROMPT = Prompt(0, "sums", ({"role": "user", "content": "1+1="},), "2", np.array([1, 2], dtype=np.int32))


def group(*answers: tuple[Verdict, str], draw: int = 0) -> RolloutGroup:
    one = np.zeros(1, np.float32)
    rollouts = [
        Rollout(draw, i, np.array([5], np.int32), one, "stop", 0, "text", verdict=verdict, reason=reason)
        for i, (verdict, reason) in enumerate(answers)
    ]
    return RolloutGroup(draw, PROMPT, rollouts, 1)


@pytest.mark.parametrize(
    ("reason", "name"),
    [
        ("", None),
        (CUT_OFF, "cut_off"),
        ("the grader failed: ValueError: bad answer", "grader_failed"),
        ("the grading process ended with signal 9", "grader_failed"),
        ("the row cannot be read: KeyError: 'x'", "grader_failed"),
        ("no verdict after 3 s", "timeout"),
        ("needed more than 1073741824 bytes of memory", "memory"),
        ("the reference answer is empty", "reference"),
        ("math-verify cannot read the reference answer", "reference"),
        ("no answer found in the response", "no_answer"),
        (r"no \boxed{} in the response", "no_answer"),
        ("math-verify finds no answer in the response", "no_answer"),
        ("the thinking is not finished: there is no </think>", "unfinished"),
        ("the last box is cut off", "unfinished"),
        ("nothing follows </think>", "no_answer"),
        ("nested too deeply", "other"),
    ],
)
def test_reasons_have_a_few_stable_names(reason, name):
    assert reason_group(reason) == name
    assert name is None or name in REASONS


def failing_grader(response, answer, data_source, extra):
    raise RuntimeError("no such table")


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
        ("test_train_reasons.failing_grader", ["grader_failed"] * 3 + ["cut_off"]),
    ],
)
def test_graders_leave_their_reason_with_every_answer(tmp_path, grader, groups):
    config, engine = settings(tmp_path, verify={"grader": grader}), Script()
    options = {"step": 1, "weight_version": 0, "tokenizer": make_tokenizer(), "stop_token_ids": [9]}
    with VerifierPool(config.verify) as pool:
        (found,), _ = generate_groups(engine, [(0, PROMPT)], config, pool, **options)
    assert engine.sampling.stop_token_ids == (9,)
    assert [reason_group(r.reason) for r in found.rollouts] == groups
    path = rollout_path(tmp_path, 1, 0)
    write_rollouts(path, [found], ["all_wrong"], step=1)
    assert read_rollout_file(path).column("reason").to_pylist() == [r.reason for r in found.rollouts]
    metrics = Metrics()
    record.add_rollouts(metrics, [found], 0.0)
    merged = Metrics.merge([metrics.state()])
    assert {name: merged[f"reason/{name}"] for name in REASONS} == {name: groups.count(name) for name in REASONS}


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
    write_rollouts(path, [group((Verdict.WRONG, "x"))], ["trained"], step=1)
    pq.write_table(pq.read_table(path).drop_columns(["reason", "prompt_opens_thinking"]), path)
    table = read_rollout_file(path)
    assert table.schema.names == SCHEMA.names and table.column("reason").to_pylist() == [None]
    assert read_rollout_file(path, ["reason", "verdict"]).to_pylist() == [{"reason": None, "verdict": "wrong"}]
    assert read_rollout_file(path, ["verdict"]).to_pylist() == [{"verdict": "wrong"}]


FAILED = (Verdict.UNPARSEABLE, "the grader failed: ValueError: bad\nanswer")
CUT = (Verdict.WRONG, CUT_OFF)
WRONG = (Verdict.WRONG, "")
SLOW = (Verdict.TIMEOUT, "no verdict after 3 s")
NONE = (Verdict.UNPARSEABLE, "no answer found in the response")
REFERENCE = (Verdict.UNPARSEABLE, "the reference answer is empty")


@pytest.mark.parametrize(
    ("answers", "said", "not_said"),
    [
        ([WRONG] * 4, "4 answers: 4 wrong. A group is kept when", "reasons"),
        ([FAILED] * 4, "4 unparseable (reasons: 4 grader failed). Grading failed", "nearer to what"),
        ([FAILED] * 4, "the grader failed: ValueError: bad answer. Mend the grader", "\n"),
        ([SLOW] * 3 + [WRONG], "1 wrong, 3 timeout (reasons: 3 timeout). Grading took too long", "nearer to what"),
        ([NONE] * 3 + [WRONG], "The grader found no answer in the texts", "nearer to what"),
        ([REFERENCE] * 4, "The reference answers cannot be used", "nearer to what"),
        ([CUT] * 3 + [WRONG], "4 wrong (reasons: 3 cut off). Most answers were cut off", "nearer to what"),
        ([NONE, WRONG, WRONG, WRONG], "(reasons: 1 no answer). A group is kept when", "Mend"),
    ],
)
def test_the_error_counts_verdicts_and_reasons(answers, said, not_said):
    text = record.why_empty(0, 4, 3, Counter(all_wrong=1), Outcomes.of([group(*answers)]))
    assert text.startswith("0 of 4 groups were kept after 3 generation batches")
    assert said in text and not_said not in text


class Ranks:
    """One rank without process groups."""

    rank, world_size, is_replica_leader, world_gloo = 0, 1, True, None


@pytest.mark.parametrize(
    ("grader", "engine", "said"),
    [
        ("test_train_reasons.failing_grader", Script(), "RuntimeError: no such table. Mend the grader"),
        ("maths", None, "100% of the answers were cut off at 3584 tokens"),
    ],
)
def test_the_rollouts_of_a_step_that_fails_are_on_disk_before_the_error(tmp_path, monkeypatch, grader, engine, said):
    class Endless:
        weight_version = 0

        def generate(self, requests, sampling, on_wait=None):
            for i in range(len(requests)):
                for sample in range(4):
                    yield i, sample, Completion(np.array([5], np.int32), np.zeros(1, np.float32), "length", 0)

    monkeypatch.setattr(collect, "gather_objects", lambda value, _: [value])
    config = settings(tmp_path, verify={"grader": grader})
    stream = SimpleNamespace(cursor=0, draw=lambda n: [(i, PROMPT) for i in range(n)])
    options = {"step": 1, "weight_version": 0, "tokenizer": make_tokenizer()}
    with VerifierPool(config.verify) as pool, pytest.raises(collect.EmptyBatchError) as error:
        collect.collect(
            lambda draws: generate_groups(engine or Endless(), draws, config, pool, **options)[0],
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
    assert said in str(error.value) and "\n" not in str(error.value)
    table = read_rollout_file(rollout_path(tmp_path, 1, 0))
    assert table.num_rows == 2 * 2 * 4
    assert set(table.column("fate").to_pylist()) == {"all_wrong"}
    assert all(table.column("reason").to_pylist())
