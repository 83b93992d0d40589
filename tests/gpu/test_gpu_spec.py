"""Transformer Engine layers give the numbers of the plain model: log-probs and gradients of one packed batch.

The reference is transformers in float64, one sequence at a time, on the CPU; the local spec is compared as well.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from gpu_policies import gradients, make_policy, make_samples, packed, relative
from objectives import Objective
from tiny import FAMILIES, make_model

pytestmark = pytest.mark.needs("engine")

LENGTHS = [37, 5, 120, 64, 2, 19]
VOCAB, DENOMINATOR = 300, 37.0


# Nonlinear, so that a wrong log-prob shows in the gradient too.
quadratic = Objective(lambda logprobs, batch: -batch.advantage * logprobs + 0.05 * logprobs.square())


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "model"
    tied = request.param == "qwen2"
    return make_model(folder, request.param, tied=tied, hidden=128, heads=4, kv_heads=2, layers=3, vocab=VOCAB)


def transformers_model(model, dtype):
    from transformers import AutoModelForCausalLM

    how = {"attn_implementation": "eager", "experts_implementation": "eager"}  # the grouped kernels have no float64
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **how)


def transformers_row(hf, sample) -> torch.Tensor:
    """Log-probs float64 [n - 1] of one sample."""
    ids = torch.from_numpy(sample.input_ids).long()
    return torch.log_softmax(hf(ids[None]).logits[0, :-1].double(), -1).gather(-1, ids[1:, None]).squeeze(-1)


@pytest.fixture(scope="module")
def reference(model):
    """(log-probs per sample float64 [n - 1], gradients by HF name), from transformers."""
    hf = transformers_model(model, torch.float64)
    rows, total = [], torch.zeros((), dtype=torch.float64)
    for sample in make_samples(LENGTHS, VOCAB):
        row = transformers_row(hf, sample)
        total = total + (-sample.advantage * row + 0.05 * row.square()).sum() / DENOMINATOR
        rows.append(row.detach().numpy())
    total.backward()
    folder = model.parent / "gradients"
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.copy_(parameter.grad)
    hf.float().save_pretrained(folder)
    return rows, folder


def limits(model, rows, precision: str) -> tuple[float, float, float]:
    """(mean and largest log-prob error, relative gradient error) that are rounding: in bf16 by what transformers itself
    rounds away there, on the CPU."""
    if precision == "fp32":
        return 2e-5, 2e-4, 2e-3
    with torch.no_grad():
        hf = transformers_model(model, torch.bfloat16)
        theirs = np.concatenate([transformers_row(hf, sample).numpy() for sample in make_samples(LENGTHS, VOCAB)])
    errors = np.abs(theirs - np.concatenate(rows))
    return 1.5 * errors.mean(), 2.5 * errors.max(), 0.05


def skip_experts(model, precision: str) -> None:
    """In 16 bits a token near a tie goes to another expert: no rounding bound holds for it."""
    if precision == "bf16" and "moe" in json.loads((model / "config.json").read_text())["model_type"]:
        pytest.skip("a mixture of experts is compared in fp32 alone")


def logprob_errors(policy, rows) -> np.ndarray:
    """|log-prob - reference| of every predicted token."""
    (batch,) = packed(policy, make_samples(LENGTHS, VOCAB))
    (found,) = policy.compute_logprobs([batch])
    edges = batch.cu_seqlens.tolist()
    return np.concatenate([np.abs(found[a : a + n - 1] - row) for a, n, row in zip(edges, LENGTHS, rows, strict=False)])


def gradient_errors(policy, folder) -> dict[str, float]:
    """Relative error of every main gradient of one step."""
    from megatron_nft.weights.import_hf import load_hf

    policy.train_step(packed(policy, make_samples(LENGTHS, VOCAB)), quadratic, DENOMINATOR)
    found = gradients(policy)
    for chunk in policy.chunks:
        chunk.float()  # the reference's gradients are not rounded
    load_hf(policy.chunks, folder, policy.spec, policy.layout)
    expected = {name: p for chunk in policy.chunks for name, p in chunk.named_parameters()}
    return {name: relative(found[name], expected[name]) for name in found}


@pytest.mark.parametrize("spec", ["transformer_engine", "local"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_agrees_with_transformers(layout, model, reference, spec, precision):
    skip_experts(model, precision)
    rows, folder = reference
    mean, largest, gradient = limits(model, rows, precision)
    policy = make_policy(layout, model, precision=precision, layer_spec=spec, optimizer={"clip_grad": 0})
    errors = logprob_errors(policy, rows)
    assert errors.mean() < mean
    assert errors.max() < largest
    wrong = {name: e for name, e in gradient_errors(policy, folder).items() if not e < gradient}
    assert not wrong


def test_norms_are_fused_and_gradients_accumulate_in_fp32(layout, model):
    skip_experts(model, "bf16")
    policy = make_policy(layout, model)
    names = {name for chunk in policy.chunks for name, _ in chunk.named_parameters()}
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in names
    fused = [m for c in policy.chunks for m in c.modules() if getattr(m, "fuse_wgrad_accumulation", False)]
    assert len(fused) == 4 * policy.spec.num_layers
    samples = make_samples(LENGTHS, VOCAB)
    policy.train_step(packed(policy, samples), quadratic, DENOMINATOR)
    whole = gradients(policy)
    other = make_policy(layout, model)
    other.train_step(packed(other, samples, [[0, 2], [1, 3], [4, 5]]), quadratic, DENOMINATOR)
    for name, grad in gradients(other).items():
        assert grad.dtype is torch.float32
        assert relative(grad, whole[name]) < 0.02, name


def test_a_padded_batch_has_the_same_gradients(layout, model):
    """The padding segment carries no loss and is seen by nobody."""
    skip_experts(model, "bf16")
    samples, found = make_samples(LENGTHS, VOCAB), []
    for multiple in (1, 128):
        policy = make_policy(layout, model, optimizer={"clip_grad": 0})
        batch = packed(policy, samples)[0]
        if multiple > 1:
            from megatron_nft.data.packing import pack

            batch = pack(samples, list(range(len(samples))), multiple_of=multiple, device=layout.device)
            assert batch.tokens.numel() % multiple == 0
        policy.train_step([batch], quadratic, DENOMINATOR)
        found.append(gradients(policy))
    for name in found[0]:
        assert relative(found[1][name], found[0][name]) < 5e-3, name


def test_one_pass_over_the_logits_has_the_same_gradients(layout, model):
    """Through Megatron's schedule and hooks, three micro-batches; the output weight of tied models too."""
    skip_experts(model, "bf16")
    samples, found = make_samples(LENGTHS, VOCAB), []
    for way in ("two_pass", "one_pass"):
        policy = make_policy(layout, model, lm_head=way, optimizer={"clip_grad": 0})
        batches = packed(policy, samples, [[0, 2], [1, 3], [4, 5]])
        policy.train_step(batches, replace(quadratic, per_token=way == "one_pass"), DENOMINATOR)
        found.append(gradients(policy))
    for name in found[0]:
        assert relative(found[1][name], found[0][name]) < 0.02, name
