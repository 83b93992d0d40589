"""FP8 recipes on the chip that is here: near bf16, bf16 where it is asked for, refused where the chip lacks them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from gpu_policies import gradients, make_policy, make_samples, packed, relative, weighted_likelihood
from objectives import Objective

pytestmark = pytest.mark.needs("engine")

LENGTHS = [200, 33, 150, 77, 2, 90]
VOCAB = 512
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8", "nvfp4")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tiny import make_model

    folder = tmp_path_factory.mktemp("fp8") / "model"
    return make_model(folder, "qwen2", hidden=256, heads=4, kv_heads=2, layers=4, ffn=512, vocab=VOCAB)


@pytest.fixture(params=RECIPES)
def recipe(request):
    from megatron_nft.policy.capability import allowed_recipes, read_gpu_stack

    if request.param not in allowed_recipes(read_gpu_stack()):
        pytest.skip(f"this chip does not have {request.param}")
    return request.param


def make(layout, model, recipe, lr=1e-3, **fp8):
    return make_policy(layout, model, fp8={"recipe": recipe, **fp8}, optimizer={"clip_grad": 0, "lr": lr})


def logprobs(policy) -> np.ndarray:
    (batch,) = packed(policy, make_samples(LENGTHS, VOCAB))
    return policy.compute_logprobs([batch])[0][: sum(LENGTHS)]


# -log p of every response token: a mean of several nats, where right and wrong answers would cancel
nll = Objective(lambda logprobs, batch: -logprobs)


def step(policy):
    return policy.train_step(packed(policy, make_samples(LENGTHS, VOCAB)), nll, float(sum(LENGTHS)))


@pytest.mark.parametrize("missing", RECIPES)
def test_a_recipe_that_the_chip_lacks_is_refused(layout, model, missing):
    from megatron_nft.policy.capability import allowed_recipes, read_gpu_stack

    if missing in allowed_recipes(read_gpu_stack()):
        pytest.skip(f"this chip has {missing}")
    with pytest.raises(ValueError, match=f"recipe={missing} needs .* Allowed here: none"):
        make(layout, model, missing)


def test_gradients_are_near_those_of_bf16_and_not_equal(layout, model, recipe):
    plain, quantized = (make(layout, model, r, lr=1e-12) for r in ("none", recipe))  # both keep the same weights
    for _ in range(2):  # the delayed recipe knows no values before its first step
        expected, found = step(plain), step(quantized)
    assert math.isfinite(found.grad_norm)
    assert found.loss == pytest.approx(expected.loss, rel=0.02)
    a, b = gradients(plain), gradients(quantized)
    errors = {name: relative(b[name], a[name]) for name in a if a[name].dim() > 1}
    limit = 0.6 if recipe == "nvfp4" else 0.3
    assert max(errors.values()) < limit, errors
    assert max(errors.values()) > 1e-3  # else nothing was quantized


def test_behaviour_logprobs_are_quantized_unless_set(layout, model, recipe):
    plain = logprobs(make(layout, model, "none"))
    policy = make(layout, model, recipe, logprobs=False)
    np.testing.assert_array_equal(logprobs(policy), plain)
    step(policy)  # in FP8, and back
    assert np.abs(logprobs(policy) - plain).max() > 0
    quantized = logprobs(make(layout, model, recipe))
    assert 1e-4 < np.abs(quantized - plain).mean() < 0.3


def test_the_first_ratio_of_an_update_is_one(layout, model, recipe):
    """Behaviour log-probs and the update's own, of the same batch under the same weights, differ by far less than FP8
    and bf16 do: at most by what another attention kernel (with and without backward) rounds differently."""
    policy = make(layout, model, recipe)
    if recipe == "delayed":
        step(policy)  # its scales are those of the steps before
    batch = packed(policy, make_samples(LENGTHS, VOCAB))
    before, in_bf16, seen = policy.compute_logprobs(batch)[0], policy.compute_logprobs(batch, quantized=False)[0], []

    def loss(found, batch):
        seen.append(found.detach().float().cpu().numpy())
        return weighted_likelihood(found, batch)

    policy.train_step(batch, Objective(loss), 100.0)
    real = slice(0, sum(LENGTHS))
    assert np.abs(seen[0] - before)[real].mean() < 0.3 * np.abs(seen[0] - in_bf16)[real].mean()


@pytest.mark.parametrize("precision", ["bf16", "recipe"])
def test_logprobs_leave_the_next_step_alone(layout, model, recipe, precision):
    """Steps after log-probs are the steps without them: scales, history and quantized weights are as before. The first
    forward pass of a model makes its quantized weights; without gradients it makes them without their transposes."""
    if recipe == "delayed" and precision == "recipe":
        pytest.skip("the largest values of that forward pass enter the history, as they should")
    found = []
    for with_logprobs in (False, True):
        policy = make(layout, model, recipe, logprobs=precision == "recipe")
        for _ in range(2):
            if with_logprobs:
                logprobs(policy)
            step(policy)
        found.append(gradients(policy))
    for name in found[0]:
        assert relative(found[1][name], found[0][name]) < 1e-6, name


def test_layers_at_both_ends_stay_in_bf16(layout, model):
    ends = {"num_layers_at_start_in_bf16": 2, "num_layers_at_end_in_bf16": 2}
    plain, all_bf16 = make(layout, model, "none"), make(layout, model, "tensorwise", **ends)
    expected, found = step(plain), step(all_bf16)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    one = make(layout, model, "tensorwise", num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=1)
    assert step(one).loss != expected.loss


def test_batches_are_padded_and_padding_does_not_move_the_scales(layout, model, recipe):
    """Per-tensor scales see the same largest values with and without padding beyond what the recipe needs."""
    policy = make(layout, model, recipe)
    assert policy.pad_multiple in (16, 32, 64, 128)
    from megatron_nft.data.packing import pack

    samples = make_samples(LENGTHS, VOCAB)
    order = list(range(len(samples)))
    short = pack(samples, order, multiple_of=policy.pad_multiple, device=layout.device)
    long = pack(samples, order, multiple_of=1024, device=layout.device)
    assert long.tokens.numel() > short.tokens.numel()
    a, b = (policy.compute_logprobs([batch])[0][: sum(LENGTHS)] for batch in (short, long))
    assert np.abs(a - b).mean() < 2e-3
    with pytest.raises(ValueError, match="need a multiple of"):
        policy.compute_logprobs([pack(samples, [0, 1], device=layout.device)])
