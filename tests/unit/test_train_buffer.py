"""A rank's open groups: no answer is lost between its end and its verdict, whatever comes when."""

from types import SimpleNamespace

import numpy as np

from megatron_nft.config import Config
from megatron_nft.engines.engine import Completion
from megatron_nft.train.buffer import OpenGroup, RolloutBuffer, cut_off
from megatron_nft.types import Prompt, Verdict
from megatron_nft.verify import Graded

PROMPT = Prompt(0, "test", ({"role": "user", "content": "q"},), "1", np.array([1], dtype=np.int32))
TOKENIZER = SimpleNamespace(decode=lambda ids, **_: "text")


class LateVerdict:
    """Not there when it is first asked for, and there right after."""

    def __init__(self) -> None:
        self.asked = 0

    def done(self) -> bool:
        self.asked += 1
        return self.asked > 1

    def result(self) -> Graded:
        return Graded(Verdict.CORRECT, None, "test", 0.0, {}, False)


def config(**rollout) -> Config:
    return Config.model_validate(
        {
            "run_dir": "unused",
            "model": {"path": "unused"},
            "data": {"train": ["unused"], "max_prompt_tokens": 4},
            "rollout": {"answers_per_question": 2, "max_response_tokens": 8, **rollout},
        }
    )


def completion(length: int, reason: str, spans=()) -> Completion:
    ids = np.arange(length, dtype=np.int32)
    return Completion(ids, np.full(length, -0.5, np.float32), reason, 3, spans)


def test_a_verdict_that_comes_while_others_are_looked_at_is_not_lost(monkeypatch):
    monkeypatch.setattr("megatron_nft.train.buffer.wait", lambda futures, timeout: None)
    buffer = RolloutBuffer([], config(), TOKENIZER, SimpleNamespace(submit=lambda *_, **__: LateVerdict()))
    buffer.open(5, PROMPT)
    buffer.add(10, completion(3, "stop"))
    buffer.add(11, completion(4, "stop"))
    buffer.take_verdicts(0.0)
    buffer.take_verdicts(0.0)
    (group,) = buffer.complete()
    assert [r.verdict for r in group.rollouts] == [Verdict.CORRECT] * 2


def test_an_answer_of_a_group_that_was_dropped_meanwhile_is_let_go():
    buffer = RolloutBuffer([], config(), TOKENIZER, SimpleNamespace())
    buffer.open(5, PROMPT)
    buffer.remove([5])
    buffer.add(10, completion(3, "stop"))
    assert buffer.complete() == []
    assert buffer.num_tokens == 0


def test_answers_begun_under_a_higher_limit_end_at_the_new_one():
    begun = {0: completion(9, "stopped", ((1, 0, 6), (2, 6, 9))), 1: completion(5, "stopped")}
    buffer = RolloutBuffer([OpenGroup(5, PROMPT, begun)], config(), TOKENIZER, SimpleNamespace())
    assert [(r.number, len(r.prefix.token_ids)) for r in buffer.requests()] == [(11, 5)]
    buffer.add(11, completion(8, "length"))
    buffer.take_verdicts(None)
    (group,) = buffer.complete()
    first = group.rollouts[0]
    assert (len(first.response_ids), len(first.rollout_logprobs), first.finish_reason) == (8, 8, "length")
    assert first.weight_version_spans == ((1, 0, 6), (2, 6, 8))


def test_a_cut_leaves_out_versions_that_begin_behind_it():
    cut = cut_off(completion(9, "stopped", ((1, 0, 4), (2, 4, 9))), 4)
    assert cut.weight_version_spans == ((1, 0, 4),)
    assert cut.token_ids.tolist() == [0, 1, 2, 3]
