"""The SGLang client against a real server: log-probs, samples, versions, aborts, refusals."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import torch
from processes import wait_until
from transformers import AutoModelForCausalLM
from under_way import requests_under_way

from megatron_nft.engines.engine import EngineError, Request, SamplingParams, WeightVersionError

END = 258  # <|im_end|>


def prompt(length, start=40):
    return np.arange(start, start + length, dtype=np.int32)


def post(engine, path, **body):
    answer = httpx.post(engine.urls[0] + path, json=body, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer


@pytest.fixture(scope="module")
def reference(sglang_model):
    """float64 log-probs of an answer by one uncached forward pass of transformers."""
    model = AutoModelForCausalLM.from_pretrained(sglang_model, dtype=torch.float64)

    def logprobs(prompt_ids, answer_ids, temperature=1.0):
        tokens = torch.tensor(np.concatenate([prompt_ids, answer_ids]).astype(np.int64))[None]
        with torch.no_grad():
            logits = model(tokens).logits[0, len(prompt_ids) - 1 : -1]
        chosen = torch.log_softmax(logits / temperature, -1).gather(-1, tokens[0, len(prompt_ids) :, None])
        return chosen[:, 0].numpy()

    return logprobs


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_equal_transformers(sglang_engine, reference, temperature):
    requests = [Request(prompt(n), 3, (0, n)) for n in (4, 9, 17)]
    seen = set()
    for i, k, c in sglang_engine.generate(requests, SamplingParams(24, temperature=temperature)):
        seen.add((i, k))
        want = reference(requests[i].prompt_ids, c.token_ids, temperature)
        assert np.abs(c.logprobs - want).max() < 1e-4
        assert c.finish_reason == ("stop" if c.token_ids[-1] == END else "length")
        assert len(c.token_ids) == 24 or c.finish_reason == "stop"
        assert c.weight_version == 0
        assert c.weight_version_spans == ()
    assert seen == {(i, k) for i in range(3) for k in range(3)}


def test_greedy_is_the_argmax_with_logprobs_at_temperature_one(sglang_engine, sglang_model, reference):
    model = AutoModelForCausalLM.from_pretrained(sglang_model)
    ids = prompt(7)
    ((_, _, c),) = sglang_engine.generate([Request(ids, 1, (0,))], SamplingParams(16, temperature=0))
    tokens = torch.tensor(ids.astype(np.int64))[None]
    want = model.generate(tokens, max_new_tokens=16, do_sample=False, attention_mask=torch.ones_like(tokens))
    assert c.token_ids.tolist() == want[0, 7:].tolist()
    assert np.abs(c.logprobs - reference(ids, c.token_ids)).max() < 1e-4


def test_prompt_logprobs_equal_transformers(sglang_engine, reference):
    ids = prompt(30)
    assert np.abs(sglang_engine.prompt_logprobs(ids) - reference(ids[:1], ids[1:])).max() < 1e-4


def test_samples_of_a_question_differ_and_follow_the_model(sglang_engine, reference):
    """First tokens of 512 samples: their mean log-prob is minus the entropy, within four standard errors."""
    ids = prompt(6)
    requests = [Request(ids, 64, (0, i)) for i in range(8)]
    first = np.array([c.logprobs[0] for *_, c in sglang_engine.generate(requests, SamplingParams(1))])
    assert len(first) == 512
    everything = np.array([reference(ids, np.array([t]))[0] for t in range(264)])
    p = np.exp(everything)
    entropy, variance = -(p * everything).sum(), (p * everything**2).sum() - (p * everything).sum() ** 2
    assert abs(first.mean() + entropy) < 4 * (variance / 512) ** 0.5


def test_sampling_settings_reach_the_server(sglang_engine):
    requests = [Request(prompt(6), 16, (0, i)) for i in range(2)]
    for *_, c in sglang_engine.generate(requests, SamplingParams(40, stop_token_ids=tuple(range(100)))):
        ended = np.isin(c.token_ids, [*range(100), END])
        assert not ended[:-1].any()
        assert (c.finish_reason == "stop") == bool(ended[-1])
    answers = {tuple(c.token_ids) for *_, c in sglang_engine.generate(requests, SamplingParams(6, top_k=1))}
    assert len(answers) == 1
    answers = {tuple(c.token_ids) for *_, c in sglang_engine.generate(requests, SamplingParams(6, top_p=0.001))}
    assert len(answers) == 1


def test_answers_of_another_version_are_refused(sglang_engine):
    post(sglang_engine, "/update_weight_version", new_version="5", abort_all_requests=False)
    with pytest.raises(WeightVersionError, match="answered under weight version 5, asked was 0"):
        next(sglang_engine.generate([Request(prompt(4), 1, (0,))], SamplingParams(4)))
    sglang_engine.weight_version = 5
    ((_, _, c),) = sglang_engine.generate([Request(prompt(4), 1, (0,))], SamplingParams(4))
    assert c.weight_version == 5


def test_aborted_requests_are_asked_again(sglang_engine, monkeypatch):
    """Everything on the server is aborted once, in the middle: all answers come nevertheless, whole."""
    aborted = []
    parse = sglang_engine._completion

    def watched(sample):
        if sample["meta_info"]["finish_reason"]["type"] == "abort":
            aborted.append(sample["meta_info"]["completion_tokens"])
        return parse(sample)

    monkeypatch.setattr(sglang_engine, "_completion", watched)
    requests = [Request(prompt(5), 2, (0, i)) for i in range(4)]
    with ThreadPoolExecutor(1) as thread:
        asking = thread.submit(lambda: list(sglang_engine.generate(requests, SamplingParams(800, temperature=0))))
        wait_until(lambda: requests_under_way("sglang", sglang_engine.urls), 60, "a request at the server")
        post(sglang_engine, "/abort_request", abort_all=True)
        answers = [c for *_, c in asking.result(300)]
    assert aborted
    assert len(answers) == 8
    assert len({tuple(c.token_ids) for c in answers}) == 1  # greedy: a cut one would differ
    assert {c.finish_reason for c in answers} <= {"stop", "length"}


def test_leaving_early_frees_the_server(sglang_engine):
    requests = [Request(prompt(5), 1, (0, i)) for i in range(32)]
    answers = sglang_engine.generate(requests, SamplingParams(200))
    next(answers)
    answers.close()
    ((_, _, c),) = sglang_engine.generate([Request(prompt(4), 1, (0,))], SamplingParams(4))
    assert len(c.token_ids) == 4 or c.finish_reason == "stop"


def test_a_prompt_that_is_too_long_is_a_clear_error(sglang_engine):
    with pytest.raises(EngineError, match=r"refused a request: HTTP 400.*(long|exceed)"):
        next(sglang_engine.generate([Request(np.full(3000, 50, dtype=np.int32), 1, (0,))], SamplingParams(4)))
