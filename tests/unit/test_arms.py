"""Arms of a comparison over seeds: paired differences, the sign test, and rows of one digest."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import arms  # noqa: E402
import smollm2_arms  # noqa: E402


@pytest.mark.parametrize(
    ("wins", "losses", "p"), [(5, 0, 2 / 32), (0, 5, 2 / 32), (9, 1, 2 * 11 / 1024), (3, 3, 1.0), (0, 0, 1.0)]
)
def test_sign_test(wins, losses, p):
    assert arms.sign_test(wins, losses) == pytest.approx(p, rel=1e-12)


def test_seeds_for_margin():
    """Spread 0.05: t(n - 1) * 0.05 / sqrt(n) is at most 0.025 from n = 18 on (t(17) = 2.1098: 0.02486)."""
    differences = np.array([-1, 1]) * 0.05 / np.sqrt(2)
    assert np.std(differences, ddof=1) == pytest.approx(0.05)
    assert arms.seeds_for_margin(differences) == 18
    assert arms.seeds_for_margin(np.array([0.1])) == 0


def test_differences_within_seeds():
    nft, other = [0.50, 0.60, 0.70, 0.55], [0.51, 0.61, 0.71, 0.56]
    d = arms.compare_arms(other, nft)
    assert d.paired.difference.mean == pytest.approx(0.01)
    assert (d.wins, d.losses) == (4, 0)
    assert d.is_equivalent
    far = arms.compare_arms([x + 0.1 for x in nft], nft)
    assert not far.is_equivalent
    assert "| not decided |" in arms.describe("x", arms.compare_arms([0.5, 0.7], [0.6, 0.5]))
    assert "| equivalent |" in arms.describe("x", d)


def test_only_rows_of_one_digest_are_pooled(tmp_path):
    path = tmp_path / "rows.jsonl"
    arms.add_seed(path, [{"seed": 0, "arm": a, "digest": "old"} for a in ("NFT", "RFT")])
    arms.add_seed(path, [{"seed": 0, "arm": a, "digest": "new"} for a in ("NFT", "RFT")])
    arms.add_seed(path, [{"seed": 1, "arm": a, "digest": "new"} for a in ("NFT", "RFT")])
    assert sorted(arms.read_seeds(path, "new")) == [0, 1]
    assert sorted(arms.read_seeds(path, "old")) == [0]
    assert arms.read_seeds(tmp_path / "absent.jsonl", "new") == {}


def test_digest_is_of_the_code_that_trains(tmp_path, monkeypatch):
    def digest():
        arms.code_digest.cache_clear()
        return arms.code_digest(("c",))

    for name in ("megatron_nft/train/loop.py", "megatron_nft/report/page.py", "configs/c.yaml", "configs/other.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(arms, "ROOT", tmp_path)
    first = digest()
    for name, changes in (
        ("megatron_nft/report/page.py", False),
        ("configs/other.yaml", False),
        ("configs/c.yaml", True),
        ("megatron_nft/train/loop.py", True),
    ):
        (tmp_path / name).write_text("2")
        assert (digest() != first) == changes, name
        first = digest()


def test_entropy_at_equal_accuracy():
    """Two straight lines, 0.2 nats apart where both were."""
    steps = np.linspace(0, 1, 41)
    row = {"accuracy": list(0.2 + 0.6 * steps), "entropy": list(1.2 - steps)}
    other = {"accuracy": list(0.2 + 0.6 * steps[::-1]), "entropy": list(1.0 - steps[::-1])}
    assert smollm2_arms.entropy_gap(row, other) == pytest.approx(0.2)
    never = {"accuracy": [0.9] * 41, "entropy": [0.1] * 41}
    assert smollm2_arms.entropy_gap(row, never) is None


def test_arms_are_settings_that_the_config_takes():
    from megatron_nft.config.load import load_config

    names = {}
    for arm, settings in smollm2_arms.ARMS.items():
        config = load_config([ROOT / "configs" / "smollm2_digits.yaml"], settings)
        names[arm] = (config.algorithm.name, config.verify.shuffle_within_groups)
    assert names == {
        "NFT": ("nft", False),
        "RFT": ("rft", False),
        "Dr. GRPO": ("dr_grpo", False),
        "control": ("nft", True),
    }
    assert json.dumps(arms.origin(smollm2_arms.CONFIGS))
