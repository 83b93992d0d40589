"""The comparison of the modes on the quick start: its settings and its table."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import grid  # noqa: E402
import mode_accuracy  # noqa: E402

from megatron_nft.config.load import load_config  # noqa: E402


def test_every_mode_trains_the_quick_start_with_its_engine():
    found = {}
    for mode, (name, settings) in mode_accuracy.MODES.items():
        config = load_config([ROOT / "configs" / f"{name}.yaml"], [*grid.GEOMETRY, *settings])
        assert config.rollout.mode == mode and config.optimizer.lr == mode_accuracy.LR
        correction = config.algorithm.with_correction_for(mode).correction
        found[mode] = (config.rollout.engine, config.rollout.max_staleness, correction)
    assert found == {
        "synchronous": ("embedded", 0, "none"),
        "streaming": ("embedded", 1, "truncate"),
        "overlapped": ("sglang", 1, "truncate"),
    }


def test_rows_have_the_digest_that_is_pooled(tmp_path):
    assert grid.Grid(tmp_path, 2, [], mode_accuracy.MODES).configs == mode_accuracy.CONFIGS
    assert grid.Grid(tmp_path, 2, []).configs == grid.CONFIGS


def rows(**accuracy):
    """Of one seed."""
    return {
        f"steps3, {mode}": {"before": 0.35, "accuracy": value, "groups": 1920, "age": 0.5, "seconds": 60.0}
        for mode, value in accuracy.items()
    }


def test_the_table_pairs_seeds_and_says_what_is_decided():
    seeds = {s: rows(synchronous=0.5 + 0.1 * s, streaming=0.51 + 0.1 * s, overlapped=0.4 + 0.1 * s) for s in range(5)}
    text = mode_accuracy.report(seeds)
    # Five differences of 0.01 and the further one of 0: spread 0.01 / sqrt(6), over sqrt(5), times t(4) = 2.776
    assert "| streaming | +1.0 (+0.5 to +1.5) | 5 : 0 (p 0.06) | yes |" in text
    assert "| overlapped | -10.0 (-15.1 to -4.9) | 0 : 5 (p 0.06) | no |" in text
    assert "| overlapped | 60.0 % | 40.0 to 80.0 % | 0.50 | 60 |" in text
    assert mode_accuracy.is_within(-0.01, 0.05) == "not decided"


def test_modes_that_trained_different_numbers_of_groups_are_not_compared():
    class Fake:
        def run_all(self, wanted):
            return [{"arm": mode, "groups": 7 if mode == "streaming" else 8} for _, mode, *_ in wanted]

    with pytest.raises(RuntimeError, match="'streaming': 7"):
        mode_accuracy.run_seed(Fake(), 0)
