"""What old answers do to NFT's gradient, with and without the correction: exact, by summing over all groups of answers.

    python benchmarks/correction_bias.py        # the table of docs/nft.md

A policy over answers of L tokens is a table of logits, one row per prefix. The trainer's policy is the engine's after
`staleness` exact steps of NFT. The expected gradient of a step's first update is the sum over all groups of K answers,
each with the probability that the engine draws it, of the gradient that `nft_loss` and the weights of
`megatron_nft.train.correction` give it. It is compared with the one where the trainer itself draws the answers.

Legend: N answers of L tokens, G = N^K groups, P prefixes, V the vocabulary.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass

import numpy as np
import torch

from megatron_nft.algorithms import read_settings
from megatron_nft.losses import nft_loss
from megatron_nft.train.correction import correct

K = 4  # answers of a question
STARTS = range(8)  # policies that the table averages over
STALENESS = (1, 2, 3, 4)
STEP_SIZE = 0.5  # of the gradient ascent between two weight versions
OMEGAS = ("dr_grpo", "uniform", "grpo")

ROWS: dict[str, dict[str, object]] = {
    "none": {},
    "token": {"correction": "truncate", "correction_high": None},
    "token, truncated to [0, 2]": {"correction": "truncate"},
    "token, truncated to [0, 1.2]": {"correction": "truncate", "correction_high": 1.2},
    "token, masked outside [0.5, 2]": {"correction": "mask", "correction_low": 0.5},
    "token, masked outside [0.8, 1.2]": {"correction": "mask", "correction_low": 0.8, "correction_high": 1.2},
    "sequence (geometric mean)": {"correction": "truncate", "correction_level": "sequence", "correction_high": None},
    "none, behaviour=engine": {"behaviour": "engine"},
}
"""What the table shows -> settings of `algorithm`."""


@dataclass(frozen=True)
class Task:
    """All answers of `length` tokens, and which of them are right."""

    length: int
    vocabulary: int
    right: tuple[int, ...]  # numbers of answers

    @property
    def answers(self) -> torch.Tensor:
        """Tokens, int64 [N, L]."""
        return torch.tensor(list(itertools.product(range(self.vocabulary), repeat=self.length)))

    @property
    def prefixes(self) -> torch.Tensor:
        """Row of the logits that each token is drawn from, int64 [N, L]. Prefixes are numbered, shorter ones first."""
        rows = torch.zeros_like(self.answers)
        for position in range(1, self.length):
            before = rows[:, position - 1] * self.vocabulary + self.answers[:, position - 1]
            rows[:, position] = before + 1
        return rows

    @property
    def correct(self) -> torch.Tensor:
        """Verdicts, float64 [N]."""
        return torch.tensor([float(i in self.right) for i in range(self.vocabulary**self.length)], dtype=torch.float64)

    def start(self, seed: int) -> torch.Tensor:
        """Logits, float64 [P, V]."""
        num_prefixes = sum(self.vocabulary**n for n in range(self.length))
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(num_prefixes, self.vocabulary, generator=generator, dtype=torch.float64)

    def logprobs(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probs of all answers' tokens, [N, L]."""
        return logits.log_softmax(-1)[self.prefixes, self.answers]


TASKS = {
    1: Task(length=1, vocabulary=4, right=(0,)),
    2: Task(length=2, vocabulary=2, right=(1,)),
    3: Task(length=3, vocabulary=2, right=(1, 6)),
}


def weights_of(trainer: torch.Tensor, engine: torch.Tensor, settings: dict[str, object]) -> torch.Tensor:
    """Weight of every token of every answer, [N, L], by the project's own correction."""
    log_ratio = (trainer - engine).detach().numpy()
    return torch.from_numpy(np.stack([correct(row, read_settings(settings)).weights for row in log_ratio]))


def expected_gradient(
    task: Task,
    logits: torch.Tensor,  # the trainer's, [P, V]
    engine: torch.Tensor,  # the engine's log-probs, [N, L]
    weights: torch.Tensor,  # [N, L]
    omega: str,
    *,
    against_engine: bool = False,  # R against the engine, in place of the trainer at the start of the step
) -> torch.Tensor:
    """d / d logits of the expected loss of a group's K answers over K, [P, V]."""
    logits = logits.clone().requires_grad_()
    groups = torch.tensor(list(itertools.product(range(len(task.correct)), repeat=K)))  # [G, K]
    probability = engine.sum(-1).exp()[groups].prod(-1)  # [G]
    verdicts = task.correct[groups]
    rate = verdicts.mean(-1)
    kept = (rate > 0) & (rate < 1)  # the others are dropped, as in training
    groups, probability, verdicts, rate = groups[kept], probability[kept], verdicts[kept], rate[kept]
    logprobs = task.logprobs(logits)
    behaviour = engine if against_engine else logprobs.detach()
    shape = (*groups.shape, task.length)
    loss = nft_loss(
        logprobs[groups].flatten(),
        behaviour[groups].flatten(),
        verdicts[..., None].expand(shape).flatten(),
        rate[:, None, None].expand(shape).flatten(),
        prompt_weight=omega,
    ).view(shape)
    total = (probability[:, None, None] * weights[groups] * loss).sum() / K
    return torch.autograd.grad(total, logits)[0]


def history(task: Task, versions: int, seed: int) -> list[torch.Tensor]:
    """Logits of `versions` + 1 weight versions, oldest first: exact on-policy NFT steps."""
    found = [task.start(seed)]
    for _ in range(versions):
        logprobs = task.logprobs(found[-1])
        gradient = expected_gradient(task, found[-1], logprobs, torch.ones_like(logprobs), "dr_grpo")
        found.append(found[-1] - STEP_SIZE * gradient)
    return found


def bias(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|."""
    return float((found - expected).norm() / expected.norm())


def biases(length: int, omega: str, settings: dict[str, object], seed: int = 0) -> list[float]:
    """The relative bias at each staleness."""
    task = TASKS[length]
    versions = history(task, max(STALENESS), seed)
    trainer = task.logprobs(versions[-1])
    on_policy = expected_gradient(task, versions[-1], trainer, torch.ones_like(trainer), omega)
    out = []
    for staleness in STALENESS:
        engine = task.logprobs(versions[-1 - staleness])
        found = expected_gradient(
            task,
            versions[-1],
            engine,
            weights_of(trainer, engine, settings),
            omega,
            against_engine=settings.get("behaviour") == "engine",
        )
        out.append(bias(found, on_policy))
    return out


def cell(value: float) -> str:
    return "0" if value < 1e-12 else f"{value:.1%}"


def table() -> str:
    """Markdown: relative bias of the expected gradient, for answers of 1 and 3 tokens, 1 and 4 steps old."""
    lines = [
        "| weight | ω | 1 token, 1 old | 1 token, 4 old | 3 tokens, 1 old | 3 tokens, 4 old |",
        "|---|---|---|---|---|---|",
    ]
    for name, settings in ROWS.items():
        for omega in OMEGAS if name in ("none", "token") else OMEGAS[:1]:
            means = [np.mean([biases(length, omega, settings, seed) for seed in STARTS], axis=0) for length in (1, 3)]
            values = [float(v) for row in means for v in row[:: len(STALENESS) - 1]]
            shown = {"dr_grpo": "1 - r̂", "uniform": "1", "grpo": "√((1 - r̂) / r̂)"}[omega]
            lines.append(f"| {name} | {shown} | " + " | ".join(map(cell, values)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
