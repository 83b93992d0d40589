"""The vLLM client against a real server: log-probs, samples, versions."""

from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_nft.config import ServerConfig
from megatron_nft.engines.engine import EngineError, Request, SamplingParams, WeightVersionError
from megatron_nft.engines.vllm.client import VLLMEngine
from megatron_nft.engines.vllm.command import command_line

END = 258  # <|im_end|>


@pytest.fixture(scope="module")
def engine(vllm_server):
    engine = VLLMEngine(vllm_server.urls, ServerConfig(), weight_version=0)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def reference(vllm_model):
    """float64 log-probs of an answer by one uncached forward pass of transformers."""
    loaded = AutoModelForCausalLM.from_pretrained(vllm_model, dtype=torch.float64)

    def logprobs(prompt_ids, answer_ids, temperature):
        tokens = torch.tensor(np.concatenate([prompt_ids, answer_ids]).astype(np.int64))[None]
        with torch.no_grad():
            logits = loaded(tokens).logits[0, len(prompt_ids) - 1 : -1] / temperature
        return torch.log_softmax(logits, -1).gather(-1, tokens[0, len(prompt_ids) :, None])[:, 0].numpy()

    return logprobs


def prompt(length, start=40):
    return np.arange(start, start + length, dtype=np.int32)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_logprobs_equal_transformers(engine, reference, temperature):
    requests = [Request(prompt(n), 3, (0, n)) for n in (4, 9, 17)]
    seen = {}
    for i, k, c in engine.generate(requests, SamplingParams(24, temperature=temperature)):
        seen[i, k] = tuple(c.token_ids)
        want = reference(requests[i].prompt_ids, c.token_ids, temperature or 1.0)
        assert np.abs(c.logprobs - want).max() < 1e-4
        assert c.finish_reason == ("stop" if c.token_ids[-1] == END else "length")
        assert END not in c.token_ids[:-1]
        assert c.weight_version == 0
    assert set(seen) == {(i, k) for i in range(3) for k in range(3)}
    assert len(set(seen.values())) == (9 if temperature else 3)


def test_prompt_logprobs_equal_transformers(engine, reference):
    ids = prompt(30)
    assert np.abs(engine.prompt_logprobs(ids) - reference(ids[:1], ids[1:], 1.0)).max() < 1e-4


def test_sampling_settings_reach_the_server(engine):
    requests = [Request(prompt(6), 16, (0, i)) for i in range(2)]
    for *_, c in engine.generate(requests, SamplingParams(40, stop_token_ids=tuple(range(100)))):
        ended = np.isin(c.token_ids, [*range(100), END])
        assert not ended[:-1].any()
        assert (c.finish_reason == "stop") == bool(ended[-1])
    answers = {tuple(c.token_ids) for *_, c in engine.generate(requests, SamplingParams(6, top_k=1))}
    assert len(answers) == 1


def test_answers_of_another_version_are_refused(engine):
    def set_version(text):
        url = f"{engine.urls[0]}/update_weight_version"
        assert httpx.post(url, json={"new_version": text}, timeout=60, trust_env=False).status_code == 200

    set_version("5")
    try:
        with pytest.raises(WeightVersionError, match="answered under weight version 5, asked was 0"):
            next(engine.generate([Request(prompt(4), 1, (0,))], SamplingParams(4)))
        engine.adopt_version()
        ((_, _, c),) = engine.generate([Request(prompt(4), 1, (0,))], SamplingParams(4))
        assert c.weight_version == engine.weight_version == 5
    finally:
        set_version("0")
        engine.weight_version = 0


def test_a_prompt_that_is_too_long_is_a_clear_error(engine):
    with pytest.raises(EngineError, match="refused a request: HTTP 400"):
        next(engine.generate([Request(np.full(3000, 50, dtype=np.int32), 1, (0,))], SamplingParams(4)))


@pytest.mark.parametrize("setting", [{"fp32_lm_head": True}, {"max_total_tokens": 100}])
def test_settings_that_vllm_lacks_are_refused(setting):
    with pytest.raises(EngineError, match=f"{next(iter(setting))} is offered by rollout.engine=sglang"):
        command_line(
            Path("python"), Path("m"), ServerConfig(**setting), device="cuda", dtype="auto", gpu=0, weight_version=0
        )


def test_its_counters_move_with_answers_and_not_without(engine):
    """The sign of progress by which a server that hangs is found (engines/watch.py)."""

    def sign() -> float:
        return engine._submit(engine._progress(engine._client, engine.urls[0])).result()

    before = sign()
    assert len(list(engine.generate([Request(prompt(6), 2, (0,))], SamplingParams(8)))) == 2
    assert sign() >= before + 2 * (6 + 1)  # prompts, and a token each at the least
    assert sign() == sign()
