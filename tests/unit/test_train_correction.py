"""The weights that correct for the gap between engine and trainer, and what is measured of the gap, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_nft.algorithms import read_settings
from megatron_nft.data.packing import pack
from megatron_nft.train.correction import Gap, GapError, correct, corrected, steps_over_limit
from megatron_nft.types import TrainingSample

RATIOS = (0.25, 1.0, 4.0, 1.0)  # geometric mean 1


def weights(ratios=RATIOS, **settings):
    return correct(np.log(ratios), read_settings(settings))


def sample(ratios, engine=-2.0):
    rollout = np.full(len(ratios), engine, np.float32)
    trainer = rollout + np.log(ratios).astype(np.float32)
    return TrainingSample(3, 1, np.arange(len(ratios) + 2, dtype=np.int32), 2, rollout, trainer, True, 0.5)


@pytest.mark.parametrize(
    ("settings", "expected", "truncated", "masked"),
    [
        ({}, [1, 1, 1, 1], 0, 0),
        ({"correction": "truncate"}, [0.25, 1, 2, 1], 1, 0),  # the default bounds, [0, 2]
        ({"correction": "truncate", "correction_low": 0.5, "correction_high": 3}, [0.5, 1, 3, 1], 2, 0),
        ({"correction": "truncate", "correction_high": None}, [0.25, 1, 4, 1], 0, 0),
        ({"correction": "mask", "correction_low": 0.5}, [0, 1, 0, 1], 0, 2),
        ({"correction": "mask", "correction_low": 0.25, "correction_high": 4}, [0.25, 1, 4, 1], 0, 0),
        ({"correction": "truncate", "correction_level": "sequence"}, [1, 1, 1, 1], 0, 0),
        ({"veto": 5}, [1, 1, 1, 1], 0, 0),
        ({"veto": 3}, [0, 0, 0, 0], 0, 4),
        ({"correction": "truncate", "veto": 3}, [0, 0, 0, 0], 0, 4),
    ],
)
def test_weights_by_hand(settings, expected, truncated, masked):
    found = weights(**settings)
    np.testing.assert_allclose(found.weights, expected, rtol=1e-12)
    assert (found.truncated, found.masked, found.vetoed) == (truncated, masked, settings.get("veto") == 3)


def test_the_level_of_the_answer_is_the_geometric_mean():
    # (1 * 8) ** (1 / 3) = 2 on every token
    found = weights((1.0, 1.0, 8.0), correction="truncate", correction_level="sequence", correction_high=1.5)
    np.testing.assert_allclose(found.ratio, [2.0] * 3, rtol=1e-12)
    assert found.weights.tolist() == [1.5] * 3 and found.truncated == 3
    masked = weights((1.0, 1.0, 8.0), correction="mask", correction_level="sequence", correction_high=1.5)
    assert masked.weights.tolist() == [0.0] * 3 and masked.masked == 3


def test_a_veto_looks_at_small_ratios_too():
    assert weights((1.0, 0.1), veto=9.0).vetoed and not weights((1.0, 0.1), veto=11.0).vetoed


def test_an_enormous_ratio_stays_finite():
    found = correct(np.array([500.0, -500.0]), read_settings({"correction": "truncate", "correction_high": None}))
    assert np.isfinite(found.weights.astype(np.float32)).all()


def test_samples_get_their_weights_and_their_behaviour_policy():
    given = sample((0.5, 4.0))
    (taken,) = corrected([given], read_settings({"correction": "truncate"}))
    np.testing.assert_allclose(taken.weights, [0.5, 2.0], rtol=1e-6)
    assert taken.weights.dtype == np.float32 and taken.behaviour_logprobs is given.behaviour_logprobs
    batch = pack([taken, given], [0, 1], multiple_of=10)
    np.testing.assert_allclose(batch.weights, [1, 0.5, 2, 1, *[1] * 6], rtol=1e-6)
    (engine,) = corrected([given], read_settings({"behaviour": "engine"}))
    assert engine.behaviour_logprobs.tolist() == given.rollout_logprobs.tolist()
    assert engine.weights.tolist() == [1.0, 1.0]
    assert given.weights is None and given.behaviour_logprobs.tolist() != given.rollout_logprobs.tolist()  # as it was


def test_what_is_measured_by_hand():
    settings = read_settings({"correction": "mask", "correction_low": 0.3, "correction_high": 3.0})
    gap = Gap()
    for part in ([sample((0.25, 1.0))], [sample((2.0, 2.0, 2.0))], []):
        gap.add(Gap.of(part, settings))
    ln2 = math.log(2)
    assert (gap.tokens, gap.answers, gap.masked, gap.truncated, gap.vetoed) == (5, 2, 1, 0, 0)
    assert gap.mean == pytest.approx((2 * ln2 + 3 * ln2) / 5, rel=1e-6)
    assert gap.largest == pytest.approx(2 * ln2, rel=1e-6)
    assert gap.k1 == pytest.approx(2 * ln2 - 3 * ln2, rel=1e-6)
    assert gap.k3 == pytest.approx((0.25 - 1 + 2 * ln2) + 3 * (2 - 1 - ln2), rel=1e-6)
    # w is 0.25, 1, 2, 2, 2: 7.25 ** 2 / (5 * 13.0625)
    assert gap.effective_share == pytest.approx(7.25**2 / (5 * 13.0625), rel=1e-6)
    assert Gap().mean == Gap().effective_share == 0.0


def test_a_nan_of_any_rank_is_not_lost():
    gap = Gap.of([sample((1.0, 2.0))], read_settings({}))
    gap.add(Gap.of([sample((math.nan,))], read_settings({})))
    gap.add(Gap.of([sample((1.0, 2.0))], read_settings({})))
    assert math.isnan(gap.largest) and math.isnan(gap.mean)


def over(gaps, limit, saved_step=8):
    counts = [0]
    for mean in gaps:
        gap = Gap(tokens=10, answers=1, absolute=10 * mean)
        counts.append(steps_over_limit(counts[-1], gap, read_settings({"gap_limit": limit}), lambda: saved_step))
    return counts[1:]


def test_only_steps_in_a_row_end_the_run():
    assert over([0.3, 0.3, 0.1, 0.3, 0.3], 0.2) == [1, 2, 0, 1, 2]
    assert over([9.0] * 5, None) == [0] * 5
    assert over([0.2] * 5, 0.2) == [0] * 5  # at the limit is not above it
    said = r"by 0.3 nats per token, and in 3 steps in a row by more than algorithm.gap_limit \(0.2\); .*of step 8 are"
    with pytest.raises(GapError, match=said):
        over([0.3, 0.25, 0.3], 0.2)
    with pytest.raises(GapError, match="nothing was saved"):
        over([math.nan] * 3, 0.2, saved_step=0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"behaviour": "engine", "correction": "mask"}, "correction=mask would weight a second time"),
        ({"correction_low": 3.0}, r"correction_low \(3.0\) must not be above correction_high \(2.0\)"),
        ({"veto": 1.0}, "veto"),
    ],
)
def test_settings_that_do_not_go_together(settings, said):
    with pytest.raises(ValueError, match=said):
        read_settings(settings)
