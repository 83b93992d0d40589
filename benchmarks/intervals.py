"""How often the intervals of evaluations hold the truth, and how often equal models come out different, by simulation.

    python benchmarks/intervals.py [--draws 10000]

Every evaluation draws Q questions, whose rates of right answers are from a Beta distribution with mean p and
concentration c (c = 1: most questions are nearly always or nearly never answered; c = 4: less so), and N answers each.
Coverage is the share of evaluations whose 95 % interval holds p. Equal models have the same rate on every question. The
percentile bootstrap over questions, which was used before, stands beside and takes nearly all of the half hour.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

from megatron_nft.evaluate.intervals import paired_difference, score_interval

GEOMETRIES = ((30, 32, (0.03, 0.13, 0.5)), (500, 1, (0.03, 0.13, 0.5)))  # questions, answers each, mean rates
CONCENTRATIONS = (1, 4)
BOOTSTRAP_DRAWS = 1000
RESAMPLES = 1000

Limits = Callable[[np.ndarray], tuple[float, float]]


def simulate(
    draws: int, questions: int, answers: int, mean: float, concentration: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores of two equal models, float64 [draws, Q] each."""
    rng = np.random.default_rng(seed)
    rates = rng.beta(mean * concentration, (1 - mean) * concentration, size=(draws, questions))
    return rng.binomial(answers, rates) / answers, rng.binomial(answers, rates) / answers


def percentile_bootstrap(values: np.ndarray) -> tuple[float, float]:
    """Return the limits that were used before. values: float [Q]."""
    rng = np.random.default_rng(len(values))
    means = values[rng.integers(0, len(values), size=(RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def ours(values: np.ndarray) -> tuple[float, float]:
    """Return the limits of `score_interval`."""
    interval = score_interval(values)
    return interval.low, interval.high


def ours_paired(differences: np.ndarray) -> tuple[float, float]:
    """Return the limits of `paired_difference`."""
    interval = paired_difference(np.zeros_like(differences), differences).difference
    return interval.low, interval.high


def coverage(limits: Limits, evaluations: np.ndarray, truth: float) -> float:
    """Return the share of evaluations (float [draws, Q]) whose interval holds the truth."""
    found = [limits(values) for values in evaluations]
    return float(np.mean([low <= truth <= high for low, high in found]))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Coverage of the intervals of evaluations, by simulation.")
    parser.add_argument("--draws", type=int, default=10_000)
    draws = parser.parse_args().draws
    print("| questions x answers | p | c | coverage % | bootstrap % | equal models differ % | bootstrap % |")
    print("|---|---|---|---|---|---|---|")
    for questions, answers, means in GEOMETRIES:
        for mean in means:
            for concentration in CONCENTRATIONS:
                a, b = simulate(draws, questions, answers, mean, concentration)
                few = slice(0, BOOTSTRAP_DRAWS)
                figures = (
                    coverage(ours, a, mean),
                    coverage(percentile_bootstrap, a[few], mean),
                    1 - coverage(ours_paired, b - a, 0.0),
                    1 - coverage(percentile_bootstrap, (b - a)[few], 0.0),
                )
                shown = " | ".join(f"{100 * f:.1f}" for f in figures)
                print(f"| {questions} x {answers} | {mean} | {concentration} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
