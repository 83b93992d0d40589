"""The random numbers and the draw from logits, against published values and the plain definitions."""

import numpy as np
import pytest
import torch

from megatron_nft.engines.embedded.sampling import draw_tokens, row_keys, uniforms
from megatron_nft.engines.engine import SamplingParams


def test_uniforms_are_splitmix64():
    # The first outputs of SplitMix64 from state 0, as in its reference implementation (Vigna, splitmix64.c).
    outputs = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    got = uniforms(np.zeros(3, dtype=np.uint64), np.arange(3))
    assert got.tolist() == [(x >> 11) / 2**53 for x in outputs]


def test_uniforms_depend_on_key_and_position_alone():
    keys = row_keys([(7, 1, 0), (7, 1, 1), (7, 2, 0)])
    assert len(set(keys.tolist())) == 3
    together = uniforms(keys, np.array([4, 4, 4]))
    for i, key in enumerate([(7, 1, 0), (7, 1, 1), (7, 2, 0)]):
        assert uniforms(row_keys([key]), np.array([4]))[0] == together[i]
    assert row_keys([(1, 2)])[0] != row_keys([(2, 1)])[0]


def test_uniforms_are_uniform_over_rows_and_positions():
    keys = row_keys((0, draw, sample) for draw in range(200) for sample in range(16))
    for values in (
        uniforms(keys, np.zeros(len(keys))),
        uniforms(np.repeat(keys[:1], 3200), np.arange(3200)),
    ):
        counts = np.histogram(values, bins=16, range=(0, 1))[0]
        chi2 = ((counts - 200) ** 2 / 200).sum()
        assert chi2 < 37.7  # 99.9 % quantile of chi-squared with 15 degrees of freedom


def test_inverse_cdf_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.0, 0.3, 0.2]], dtype=torch.float64)).repeat(6, 1)
    u = torch.tensor([0.0, 0.49, 0.51, 0.79, 0.81, 1 - 2**-53], dtype=torch.float64)
    tokens, logprobs = draw_tokens(logits, u, SamplingParams(1))
    assert tokens.tolist() == [0, 0, 2, 2, 3, 3]  # token 1 has probability 0
    want = np.log([0.5, 0.5, 0.3, 0.3, 0.2, 0.2])
    assert np.allclose(logprobs.numpy(), want, atol=1e-7)


def test_last_token_without_probability_is_never_drawn():
    logits = torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf]]).repeat(3, 1)
    tokens, _ = draw_tokens(
        logits, torch.tensor([1 - 2**-53, 1 - 2**-52, 0.9999], dtype=torch.float64), SamplingParams(1)
    )
    assert tokens.tolist() == [1, 1, 1]


def test_frequencies_and_logprobs_follow_the_temperature():
    torch.manual_seed(0)
    logits = torch.randn(8) * 2
    u = torch.from_numpy(uniforms(np.zeros(40000, dtype=np.uint64), np.arange(40000)))
    tokens, logprobs = draw_tokens(logits.repeat(40000, 1), u, SamplingParams(1, temperature=0.7))
    want = torch.softmax(logits.double() / 0.7, -1)
    frequency = torch.bincount(tokens, minlength=8) / 40000
    assert (frequency - want).abs().max() < 4 * (0.25 / 40000) ** 0.5  # four standard errors at the most
    assert torch.allclose(logprobs.double(), want.log()[tokens], atol=1e-6)


def test_greedy_takes_the_largest_and_reports_temperature_one():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    tokens, logprobs = draw_tokens(logits, torch.tensor([0.99], dtype=torch.float64), SamplingParams(1, temperature=0))
    assert tokens.tolist() == [1]
    assert logprobs.item() == pytest.approx(3 - np.log(np.exp(1) + np.exp(2) + np.exp(3)), abs=1e-6)


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (SamplingParams(1, top_k=2), {0, 2}),
        (SamplingParams(1, top_p=0.5), {0}),  # reaches 0.5 with the first
        (SamplingParams(1, top_p=0.51), {0, 2}),
        (SamplingParams(1, top_p=0.81), {0, 2, 3}),
        (SamplingParams(1, top_k=2, top_p=0.6), {0}),  # 0.5 of the 0.8 left is 0.625
        (SamplingParams(1, top_k=99), {0, 1, 2, 3}),
    ],
)
def test_top_k_and_top_p_cut(sampling, allowed):
    probabilities = torch.tensor([0.5, 0.05, 0.3, 0.15], dtype=torch.float64)
    u = torch.linspace(0, 1, 2001, dtype=torch.float64)[:-1]
    tokens, logprobs = draw_tokens(probabilities.log().repeat(2000, 1), u, sampling)
    assert set(tokens.tolist()) == allowed
    assert torch.allclose(logprobs.double(), probabilities.log()[tokens], atol=1e-6)  # of the uncut distribution


@pytest.mark.parametrize(
    "bad", [{"max_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_k": 0}]
)
def test_impossible_sampling_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingParams(**({"max_tokens": 4} | bad))
