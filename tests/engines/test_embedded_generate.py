"""Rollouts of a generation batch, with the embedded engine and the real verifier."""

import numpy as np
import pytest
from tiny import make_model, make_tokenizer

from megatron_nft.config import Config, VerifyConfig
from megatron_nft.engines.answers import generate_groups
from megatron_nft.engines.embedded.engine import EmbeddedEngine
from megatron_nft.engines.engine import WeightVersionError
from megatron_nft.types import Prompt, Verdict
from megatron_nft.verify.pool import VerifierPool

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return EmbeddedEngine.create(make_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def verifier():
    with VerifierPool(VerifyConfig(grader=f"{__name__}.starts_with_answer")) as pool:
        yield pool


def starts_with_answer(response, answer, data_source, extra):
    """A reward function of the user's own."""
    assert data_source == "letters"
    assert extra == {"n": 1}
    return response[:1].lower() == answer


def draws(count):
    ids = make_tokenizer().encode("say a letter:")
    message = ({"role": "user", "content": "say a letter"},)
    prompt = [Prompt(i, "letters", message, LETTERS[i], np.array(ids, dtype=np.int32), {"n": 1}) for i in range(count)]
    return [(100 + i, p) for i, p in enumerate(prompt)]


def config(tmp_path, **overrides):
    rollout = {"answers_per_question": 40, "max_response_tokens": 30}
    return Config(run_dir=tmp_path, model={"path": tmp_path}, data={"train": [tmp_path]}, rollout=rollout, **overrides)


def generate(engine, verifier, config, count=3, **kwargs):
    return generate_groups(
        engine, draws(count), config, verifier, step=5, weight_version=0, tokenizer=make_tokenizer(), **kwargs
    )


def test_groups_come_in_order_and_graded(engine, verifier, tmp_path):
    progress = []
    groups, verify_wait_s = generate(engine, verifier, config(tmp_path), on_progress=lambda *a: progress.append(a))
    assert [g.draw for g in groups] == [100, 101, 102]
    assert progress == [(i, 120) for i in range(1, 121)]
    tokenizer = make_tokenizer()
    for g in groups:
        assert g.step == 5
        assert [r.sample_index for r in g.rollouts] == list(range(40))
        for r in g.rollouts:
            assert r.draw == g.draw
            assert r.weight_version == 0
            assert r.text == tokenizer.decode(r.response_ids, skip_special_tokens=True)
            assert len(r.rollout_logprobs) == len(r.response_ids)
            good = r.finish_reason == "stop" and r.text[:1].lower() == g.prompt.answer
            assert r.verdict is (Verdict.CORRECT if good else Verdict.WRONG)
            assert not r.ignored
    rollouts = [r for g in groups for r in g.rollouts]
    assert len(rollouts) == 120
    assert verify_wait_s >= 0
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}


def test_truncated_answers_can_be_left_out(engine, verifier, tmp_path):
    groups, _ = generate(engine, verifier, config(tmp_path, algorithm={"truncated": "drop"}))
    for r in (r for g in groups for r in g.rollouts):
        assert r.ignored == (r.finish_reason == "length")


def test_same_draw_same_answer_whatever_the_batch(engine, verifier, tmp_path):
    three, _ = generate(engine, verifier, config(tmp_path))
    one, _ = generate(engine, verifier, config(tmp_path), count=1)
    other, _ = generate(engine, verifier, config(tmp_path, seed=1), count=1)
    texts = [[r.text for r in g.rollouts] for g in (three[0], one[0], other[0])]
    assert texts[0] == texts[1] != texts[2]


def test_engine_of_another_version_is_refused(engine, verifier, tmp_path):
    with pytest.raises(WeightVersionError, match="the engine has weight version 0, not 4"):
        generate_groups(engine, [], config(tmp_path), verifier, step=0, weight_version=4, tokenizer=None)
