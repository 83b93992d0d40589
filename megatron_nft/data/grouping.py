"""From a question's K graded answers to what the loss trains on."""

from __future__ import annotations

from typing import Literal

import numpy as np

from megatron_nft.config import AlgorithmConfig
from megatron_nft.algorithms.policy_gradient import advantages
from megatron_nft.types import Rollout, RolloutGroup, TrainingSample

GroupClass = Literal["kept", "all_correct", "all_wrong", "too_few"]


def classify(group: RolloutGroup) -> GroupClass:
    """Whether the group teaches anything: it does when its answers that count are neither all right nor all wrong.

    too_few: fewer than two answers count (the rest were set aside as `ignored`).
    """
    counted = [r.correct for r in group.rollouts if not r.ignored]
    if len(counted) < 2:
        return "too_few"
    if all(counted):
        return "all_correct"
    return "kept" if any(counted) else "all_wrong"


def to_samples(group: RolloutGroup, algorithm: AlgorithmConfig, max_response_tokens: int) -> list[TrainingSample]:
    """The answers of a kept group that are trained, in order; ignored ones are left out.

    Without a negative term (rft, or negative_weight 0) the wrong answers are left out too: they would cost a
    forward pass each, and with loss_divisor=tokens they would count in the denominator of a loss they are not in.

    `correct_rate` is the group's, clamped to the algorithm's range; advantages come from unclamped rewards.
    """
    rollouts = [r for r in group.rollouts if not r.ignored]
    rate = float(np.clip(group.correct_rate, algorithm.correct_rate_min, algorithm.correct_rate_max))
    if algorithm.name in ("nft", "rft"):
        scores = np.zeros(len(rollouts))
        positives_only = algorithm.name == "rft" or algorithm.negative_weight == 0
    else:
        rewards = np.array([_reward(r, algorithm, max_response_tokens) for r in rollouts])
        scores = advantages(rewards, algorithm.name)
        positives_only = False
    return [
        TrainingSample(
            draw=group.draw,
            sample_index=r.sample_index,
            input_ids=np.concatenate([group.prompt.token_ids, r.response_ids]).astype(np.int32),
            prompt_length=len(group.prompt.token_ids),
            rollout_logprobs=r.rollout_logprobs,
            behaviour_logprobs=r.trainer_logprobs,
            correct=r.correct,
            correct_rate=rate,
            advantage=float(score),
            step=group.step,
        )
        for r, score in zip(rollouts, scores)
        if r.correct or not positives_only
    ]


def _reward(rollout: Rollout, algorithm: AlgorithmConfig, max_response_tokens: int) -> float:
    """0 or 1; for DAPO -1 or 1, less the penalty for a long answer (its section 3.4).

    The penalty rises linearly from 0 to `overlong_penalty` over the last `overlong_buffer_tokens` tokens.
    """
    if algorithm.name != "dapo":
        return float(rollout.correct)
    reward = 1.0 if rollout.correct else -1.0
    buffer = algorithm.overlong_buffer_tokens
    if buffer:
        excess = len(rollout.response_ids) - (max_response_tokens - buffer)
        reward -= algorithm.overlong_penalty * min(max(excess / buffer, 0.0), 1.0)
    return reward
