"""The embedded engine against transformers: log-probs, greedy answers, batches, weight updates, refusals."""

from shutil import copytree

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, make_model
from transformers import AutoModelForCausalLM

from megatron_nft.engines.embedded.engine import EmbeddedEngine
from megatron_nft.engines.engine import EngineError, Request, SamplingParams, WeightUpdateError

END = 258  # <|im_end|>


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: make_model(root / family, family, seed=i) for i, family in enumerate(FAMILIES)}


@pytest.fixture(scope="module")
def qwen2(folders):
    return EmbeddedEngine.create(folders["qwen2"])


def prompt(length, start=40):
    return np.arange(start, start + length, dtype=np.int32)


def reference_logprobs(folder, prompt_ids, answer_ids, temperature=1.0):
    """float64 [R] by one uncached forward pass of transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    tokens = torch.tensor(np.concatenate([prompt_ids, answer_ids]).astype(np.int64))[None]
    with torch.no_grad():
        logits = model(tokens).logits[0, len(prompt_ids) - 1 : -1]
    return torch.log_softmax(logits / temperature, -1).gather(-1, tokens[0, len(prompt_ids) :, None])[:, 0].numpy()


def collect(engine, requests, sampling):
    answers = {}
    for request, sample, completion in engine.generate(requests, sampling):
        assert (request, sample) not in answers
        answers[request, sample] = completion
    assert set(answers) == {(i, k) for i, r in enumerate(requests) for k in range(r.num_samples)}
    return answers


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_equal_transformers(folders, family):
    engine = EmbeddedEngine.create(folders[family])
    requests = [Request(prompt(n), 3, (0, n)) for n in (5, 9, 9, 6)]  # different lengths: padded and masked
    for (request, _), c in collect(engine, requests, SamplingParams(24, temperature=0.8)).items():
        want = reference_logprobs(folders[family], requests[request].prompt_ids, c.token_ids, 0.8)
        assert np.abs(c.logprobs - want).max() < 1e-5
        assert c.finish_reason == ("stop" if c.token_ids[-1] == END else "length")
        assert END not in c.token_ids[:-1]
        assert c.token_ids.dtype == np.int32
        assert c.logprobs.dtype == np.float32
    ids = prompt(17)
    want = reference_logprobs(folders[family], ids[:1], ids[1:])
    assert np.abs(engine.prompt_logprobs(ids) - want).max() < 1e-5


def test_greedy_equals_transformers_generate(folders, qwen2):
    model = AutoModelForCausalLM.from_pretrained(folders["qwen2"])
    requests = [Request(prompt(n, 60 + n), 1, (0, n)) for n in (4, 8, 11)]
    answers = collect(qwen2, requests, SamplingParams(30, temperature=0))
    for i, r in enumerate(requests):
        ids = torch.tensor(r.prompt_ids.astype(np.int64))[None]
        want = model.generate(ids, max_new_tokens=30, do_sample=False, attention_mask=torch.ones_like(ids))[
            0, ids.shape[1] :
        ]
        assert answers[i, 0].token_ids.tolist() == want.tolist()


def test_answers_do_not_depend_on_the_batch(folders):
    requests = [Request(prompt(n), 4, (3, i)) for i, n in enumerate((5, 12, 7, 5))]
    sampling = SamplingParams(40)
    whole = collect(EmbeddedEngine.create(folders["qwen2"], batch_tokens=1 << 20), requests, sampling)
    single = collect(EmbeddedEngine.create(folders["qwen2"], batch_tokens=1), requests, sampling)
    alone = collect(EmbeddedEngine.create(folders["qwen2"]), requests[2:3], sampling)
    for key, c in whole.items():
        assert c.token_ids.tolist() == single[key].token_ids.tolist()
        assert np.allclose(c.logprobs, single[key].logprobs, atol=1e-5)
    for k in range(4):
        assert alone[0, k].token_ids.tolist() == whole[2, k].token_ids.tolist()
    assert len({tuple(c.token_ids) for c in whole.values()}) == len(whole)  # each sample has random numbers of its own


def test_repeated_call_is_bitwise_equal(qwen2):
    requests = [Request(prompt(6), 5, (1, 1))]
    first, second = (collect(qwen2, requests, SamplingParams(20)) for _ in range(2))
    for key in first:
        assert first[key].token_ids.tobytes() == second[key].token_ids.tobytes()
        assert first[key].logprobs.tobytes() == second[key].logprobs.tobytes()


def test_answers_come_as_they_end(qwen2):
    """Rows that end early are handed over before the longest is done, and removed from the batch."""
    requests = [Request(prompt(6), 64, (5, 0))]
    stops = tuple(range(40))  # about one token in six ends an answer
    lengths = [len(c.token_ids) for *_, c in qwen2.generate(requests, SamplingParams(200, stop_token_ids=stops))]
    assert lengths == sorted(lengths)
    assert lengths[0] < 4 < lengths[-1]


def test_extra_stop_tokens_end_an_answer(folders, qwen2):
    requests = [Request(prompt(6), 16, (5, 0))]
    for c in collect(qwen2, requests, SamplingParams(64, stop_token_ids=tuple(range(128)))).values():
        ended = np.isin(c.token_ids, [*range(128), END])
        assert not ended[:-1].any()
        assert (c.finish_reason == "stop") == bool(ended[-1])


def perturbed(folder, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    return {k: v + 0.05 * torch.randn(v.shape, generator=generator) for k, v in tensors.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_update_equals_a_model_saved_with_the_weights(folders, family, tmp_path):
    new = perturbed(folders[family], 1)
    engine = EmbeddedEngine.create(folders[family], load_weights=False)
    assert engine.weight_version == -1
    with pytest.raises(EngineError, match="incomplete"):
        engine.prompt_logprobs(prompt(4))
    items = list(new.items())
    engine.update_weights(items[:5])
    engine.update_weights(items[5:])
    with pytest.raises(EngineError, match="incomplete"):
        next(engine.generate([Request(prompt(4), 1, (0,))], SamplingParams(4)))
    engine.finish_update(7)
    assert engine.weight_version == 7
    copytree(folders[family], tmp_path, dirs_exist_ok=True)
    save_file(new, tmp_path / "model.safetensors", {"format": "pt"})
    want = reference_logprobs(tmp_path, prompt(1), prompt(20)[1:])
    assert np.abs(engine.prompt_logprobs(prompt(20)) - want).max() < 1e-5
    (*_, c), *_ = engine.generate([Request(prompt(4), 1, (0,))], SamplingParams(4))
    assert c.weight_version == 7


def test_bad_updates_name_the_tensor(folders):
    engine = EmbeddedEngine.create(folders["qwen2"])
    tensors = perturbed(folders["qwen2"], 2)
    name, tensor = "model.layers.1.mlp.up_proj.weight", tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(WeightUpdateError, match=r"model\.layers\.9\.norm: .* none of that name"):
        engine.update_weights([("model.layers.9.norm", tensor)])
    with pytest.raises(WeightUpdateError, match=rf"{name}: came as torch.float32 \[64, 192\].* \[192, 64\]"):
        engine.update_weights([(name, tensor.T)])
    with pytest.raises(WeightUpdateError, match=f"{name}: came as torch.bfloat16"):
        engine.update_weights([(name, tensor.bfloat16())])
    with pytest.raises(WeightUpdateError, match=f"{name}: came twice"):
        engine.update_weights([(name, tensor), (name, tensor)])
    engine.begin_update()
    engine.update_weights((k, v) for k, v in tensors.items() if k != name)
    with pytest.raises(WeightUpdateError, match=f"1 of 27 tensors did not come: {name}"):
        engine.finish_update(1)
    with pytest.raises(EngineError, match="incomplete"):
        engine.prompt_logprobs(prompt(4))
    engine.update_weights([(name, tensor)])
    embedding = tensors["model.embed_tokens.weight"]
    engine.update_weights([("lm_head.weight", embedding)])  # tied, and equal
    engine.finish_update(1)
    with pytest.raises(WeightUpdateError, match=r"tied to model\.embed_tokens\.weight"):
        engine.update_weights([("model.embed_tokens.weight", embedding), ("lm_head.weight", embedding + 1)])


def test_model_that_does_not_fit_is_refused_with_the_numbers(folders):
    parameters = sum(v.numel() for v in load_file(folders["qwen2"] / "model.safetensors").values())
    copies = psutil.virtual_memory().total // (parameters * 4) + 1
    with pytest.raises(EngineError, match=rf"{copies} x {parameters:,} parameters in float32 are .* GiB free"):
        EmbeddedEngine.create(folders["qwen2"], num_copies=copies)


def test_too_long_and_empty_prompts_are_refused(qwen2):
    with pytest.raises(ValueError, match=r"2000 tokens and max_tokens=100: the model takes 1 to 2048"):
        next(qwen2.generate([Request(np.zeros(2000, dtype=np.int32), 1, (0,))], SamplingParams(100)))
    with pytest.raises(ValueError, match="a prompt of 0 tokens"):
        next(qwen2.generate([Request(np.zeros(0, dtype=np.int32), 1, (0,))], SamplingParams(100)))


def test_missing_folder_is_a_clear_error(tmp_path):
    with pytest.raises(EngineError, match="model folder"):
        EmbeddedEngine.create(tmp_path / "nothing")


def test_closed_engine_says_so(folders):
    engine = EmbeddedEngine.create(folders["qwen2"])
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.prompt_logprobs(prompt(3))
