"""The comparison of nine arms: its second task, its rows, its choice of learning rates."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import grid  # noqa: E402
import grid_tasks  # noqa: E402

from megatron_nft.config.load import load_config  # noqa: E402


@pytest.mark.parametrize(
    ("response", "right"),
    [
        (r"108=\boxed{50+58}", True),
        (r"108=\boxed{99+10}", False),  # 109
        (r"108=\boxed{98+10}", True),
        (r"\boxed{9+99}", False),  # 9 is below 10
        (r"\boxed{100+08}", False),
        (r"\boxed{108}", False),
        (r"\boxed{50+58} or so", False),
        (r"\boxed{50+58", False),
        (r"\boxed{50+50}\boxed{50+58}", True),
    ],
)
def test_pairs_are_graded(response, right):
    assert grid_tasks.grade(response, "108", "pairs", None) is right


def test_pairs_are_questions_with_right_solutions_of_which_none_is_asked_twice():
    drawn = grid_tasks.pairs(2000)
    assert len({p.question for p in drawn}) == 2000
    for p in drawn:
        assert 10 <= p.x <= 99
        assert 10 <= p.y <= 99
        assert grid_tasks.is_right(p.solution, p.answer)
        total, _, right_side = p.question.removeprefix("?+?-").partition("=")
        assert int(p.answer) - int(total) == int(right_side)
    assert {p.question for p in drawn} == {p.question for p in grid_tasks.pairs(2000)}
    with pytest.raises(ValueError, match="there are 1 to 16110 different ones"):
        grid_tasks.pairs(16111)


def test_every_arm_is_a_config_with_its_own_loss():
    found = {}
    for arm, (name, settings) in grid.ARMS.items():
        config = load_config([ROOT / "configs" / f"{name}.yaml"], [*grid.GEOMETRY, *settings])
        a = config.algorithm
        found[arm] = (a.name, getattr(a, "prompt_weight", None), config.verify.shuffle_within_groups)
    assert found == {
        "NFT(1 - r)": ("nft", "dr_grpo", False),
        "NFT(1)": ("nft", "uniform", False),
        "NFT(sqrt)": ("nft", "grpo", False),
        "RFT": ("rft", "uniform", False),
        "RFT(1 - r)": ("rft", "dr_grpo", False),
        "Dr. GRPO": ("dr_grpo", None, False),
        "GRPO": ("grpo", None, False),
        "DAPO": ("dapo", None, False),
        "control": ("nft", "dr_grpo", True),
    }


def test_rates_are_chosen_by_the_mean_over_seeds_and_the_control_takes_nfts(tmp_path, monkeypatch):
    class Fake:
        def run_all(self, wanted):
            def accuracy(arm, seed, lr):  # 1e-3 wins one seed, 3e-4 the mean
                best = 1e-4 if arm == "GRPO" else 3e-4
                return 0.9 if (lr == 1e-3 and seed == grid.LR_SEEDS[0]) else 0.7 if lr == best else 0.2

            return [
                {"arm": f"{task}, {arm}", "lr": lr, "accuracy": accuracy(arm, seed, lr)}
                for task, arm, seed, lr, _ in wanted
            ]

    grid.choose_rates(Fake(), ["pairs"], tmp_path)
    rates = grid.read_rates(tmp_path, ["pairs"])
    assert rates["pairs, NFT(1 - r)"] == rates["pairs, control"] == 3e-4
    assert rates["pairs, GRPO"] == 1e-4
    assert json.loads((tmp_path / "lr.json").read_text())["accuracy"]["pairs, GRPO"]["0.001"] == pytest.approx(0.55)
    with pytest.raises(SystemExit, match="--choose-lr"):
        grid.read_rates(tmp_path / "other", ["pairs"])


def test_the_report_pairs_seeds(tmp_path):
    seeds = {
        seed: {
            f"pairs, {arm}": {"lr": 3e-4, "before": 0.3, "accuracy": 0.5 + 0.1 * seed + 0.01 * i, "clipped": 0.05}
            for i, arm in enumerate(grid.ARMS)
        }
        for seed in range(3)
    }
    text = grid.report(seeds, ["pairs"])
    # the third arm is two hundredths above NFT in every seed, though seeds differ by ten
    assert "| NFT(sqrt) | +2.0 (" in text
    assert "| 3 : 0 (p 0.25) |" in text
    assert "| NFT(1 - r) | 0.0003 | 60.0 % | 50.0 to 70.0 % | at most 5.0% |" in text
