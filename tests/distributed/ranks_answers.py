"""One gradient under context parallelism for losses of whole answers, whose tokens lie on several ranks: NFT with one
ratio per answer, and GSPO. The reference is each equation in float64, over transformers' log-probs."""

import math

import numpy as np
import torch
from launch import Ranks, run_checks
from policies import (
    DENOMINATOR,
    TEMPERATURE,
    UNEVEN,
    deal,
    gradient_errors,
    make_policy,
    make_reference,
    samples,
)
from ranks_gradient import TOLERANCE

from megatron_nft.algorithms.gspo import GSPO
from megatron_nft.algorithms.nft import NFT
from megatron_nft.types import TrainingSample

CP2 = {"context_parallel_size": 2}
LOG_RATIOS = (0.4, -0.3, 0.5, 0.2, -0.4, 0.3, -0.6, 0.1)  # two of the wrong answers, 0 and 2, are at the clamp
EPSILON = 0.9
CLIP = 0.05  # GSPO's ratio is the mean over tokens


def answers(rows: list[np.ndarray]) -> list[TrainingSample]:
    """The samples, right and wrong, of rates of all kinds, with behaviour log-probs such that log R of whole answers is
    LOG_RATIOS. rows: the model's log-probs."""
    rng, made = np.random.default_rng(1), samples()
    for i, (sample, row) in enumerate(zip(made, rows, strict=True)):
        noise = rng.normal(0, 0.2, sample.response_length)
        noise += LOG_RATIOS[i] / len(noise) - noise.mean()
        sample.behaviour_logprobs = (row[sample.prompt_length - 1 : -1] - noise).astype(np.float32)
        sample.correct, sample.correct_rate = bool(i % 2), (0.2, 0.5, 0.8)[i % 3]
    return made


def log_ratios(logprobs: torch.Tensor, sample: TrainingSample) -> torch.Tensor:
    return logprobs - torch.from_numpy(sample.behaviour_logprobs).double()


def spread(loss: torch.Tensor, sample: TrainingSample) -> torch.Tensor:
    """What an answer's loss adds, spread evenly over tokens that have weights."""
    return loss * float(sample.weights.mean(dtype=np.float64)) / DENOMINATOR


def nft_of_answer(logprobs: torch.Tensor, sample: TrainingSample) -> torch.Tensor:
    """NFT's equation for one answer: R is the product of its tokens' ratios; omega = 1 - r."""
    r, ratio = sample.correct_rate, log_ratios(logprobs, sample).sum().exp()
    if sample.correct:
        return spread(-(1 - r) * ratio.log(), sample)
    argument = (1 - r * ratio) / (1 - r)
    value = max(float(argument.detach()), EPSILON)  # its value is clamped, its gradient is not
    return spread(-(1 - r) * (math.log(value) + (argument - argument.detach()) / value), sample)


def gspo_of_answer(logprobs: torch.Tensor, sample: TrainingSample) -> torch.Tensor:
    """Equations 5 and 7 of arXiv 2507.18071 for one answer."""
    s, advantage = log_ratios(logprobs, sample).mean().exp(), sample.advantage
    return spread(-torch.minimum(s * advantage, s.clamp(1 - CLIP, 1 + CLIP) * advantage), sample)


def compare_answers(ranks: Ranks, loss_of, algorithm, **layout: object) -> None:
    """The loss, its gradient and the algorithm's metrics, which are the same in every layout."""
    made = answers(make_reference(ranks, "qwen2", tied=True).logprobs)
    reference = make_reference(ranks, "qwen2", tied=True, loss_of=loss_of, made=made)
    policy = make_policy(reference.model, use_distributed_optimizer=False, optimizer={"clip_grad": 0.0}, **layout)
    report = policy.train_step(deal(policy, UNEVEN, made), algorithm, DENOMINATOR, TEMPERATURE)
    # the loss is a sum of differences, of which rounding is a larger part than of log-probs near 6
    np.testing.assert_allclose(report.loss, reference.loss, rtol=1e-4)
    np.testing.assert_allclose(report.grad_norm, reference.grad_norm, rtol=TOLERANCE)
    errors = gradient_errors(policy, reference)
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= TOLERANCE, f"{worst} has relative error {errors[worst]:.2e}"
    tokens = [s.response_length for s in made]
    assert report.num_tokens == sum(tokens)
    mean = report.metrics["ratio/log_mean"]
    np.testing.assert_allclose(mean.total, sum(LOG_RATIOS), atol=1e-4)
    assert mean.count == sum(tokens)
    if "clamp/share" in report.metrics:
        share = report.metrics["clamp/share"]
        assert (share.total, share.count) == (tokens[0] + tokens[2], sum(tokens[::2]))


LAYOUTS = (
    {},
    CP2,
    {**CP2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    {**CP2, "pipeline_model_parallel_size": 2},
    {"context_parallel_size": 4},
)


def check_nft_with_one_ratio_per_answer(ranks: Ranks) -> None:
    settings = NFT.Settings(ratio="sequence", loss_divisor=DENOMINATOR, clamp=EPSILON)
    for layout in LAYOUTS:
        compare_answers(ranks, nft_of_answer, NFT(settings, max_response_tokens=32), **layout)


def check_gspo(ranks: Ranks) -> None:
    settings = GSPO.Settings(loss_divisor=DENOMINATOR, clip_low=CLIP, clip_high=CLIP)
    for layout in LAYOUTS:
        compare_answers(ranks, gspo_of_answer, GSPO(settings, max_response_tokens=32), **layout)


if __name__ == "__main__":
    run_checks(globals())
