"""The benchmark of the modes: its workload, its calibration, and repetitions that are made once."""

import json
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import rollout_modes  # noqa: E402

WORK = json.loads((ROOT / "benchmarks" / "rollout_modes.json").read_text())


class Fake(rollout_modes.Bench):
    """Runs that take no time; those of repetition `fails` do not end well."""

    fails = -2

    def prepare(self, closing: ExitStack) -> None:
        self.made: list[str] = []

    def run(self, name, mode, seed, token_s=0.0):
        if seed == self.fails + 1:
            raise RuntimeError(name)
        self.made.append(name)
        speed = {"synchronous": 10.0, "streaming": 15.0, "overlapped": 20.0}[mode] * (1 + seed)
        return {"tokens_per_s": speed, "groups": 96, "step_s": 3.0, "generate_s": 1.0 + 100 * token_s, "age": 0.5}


def test_an_interrupted_benchmark_goes_on_after_its_last_whole_repetition(tmp_path):
    work, path, facts = {**WORK, "ratios": [1.0]}, tmp_path / "rows.jsonl", {"digest": "d", "server": "waiting"}
    bench = Fake(tmp_path, work, "waiting")
    bench.fails = 1
    with pytest.raises(RuntimeError, match="-1-synchronous"):
        rollout_modes.measure(bench, path, facts, 2)
    assert len(bench.made) == 2 + 3
    bench.fails = -2
    rollout_modes.measure(bench, path, facts, 2)
    ratio = rollout_modes.plan_ratio(work)
    names = [f"{r}-{mode}" for r in (f"{ratio}-1", "1.0-0", "1.0-1") for mode in rollout_modes.MODES]
    assert bench.made == names, "neither the calibration nor the first repetition again"
    rows = rollout_modes.read_rows(path, "waiting", "d")
    assert len(rows) == 1 + 2 * 2 * 3
    text = "\n".join(rollout_modes.report(rows, work, "waiting"))
    # 20 and 30 tokens a second against 30 and 45
    assert "| streaming | 38 | 1.50 (1.50 to 1.50) | 1.3 | 3.00 |" in text
    assert "Generation : training = 1 : 1" in text
    assert rollout_modes.read_rows(path, "waiting", "other") == rollout_modes.read_rows(path, "sglang", "d") == []


def test_a_token_takes_what_makes_generation_last_as_long_as_asked_for():
    """Beside tokens generation takes 0.5 s; a step has 60 decode steps: 2 x 1.5 s = 0.5 s + 60 x 41.7 ms."""
    calibration = {"training_s": 1.5, "generation_s": 0.5, "tokens": 60.0}
    assert rollout_modes.token_seconds(calibration, 2.0) == pytest.approx(2.5 / 60 + rollout_modes.SHORT_TOKEN_S)
    assert rollout_modes.token_seconds(calibration, 0.1) == rollout_modes.SHORT_TOKEN_S


@pytest.mark.parametrize("server", ["waiting", "sglang"])
@pytest.mark.parametrize("mode", rollout_modes.MODES)
def test_every_mode_has_the_same_workload(tmp_path, mode, server):
    from megatron_nft.config import Config

    made = rollout_modes.Bench(tmp_path, WORK, server).settings(tmp_path / "run", mode, 1, ["http://127.0.0.1:1"])
    config = Config.model_validate(made)
    assert config.rollout.mode == mode
    trained = config.train.num_steps * config.train.questions_per_step * config.rollout.answers_per_question
    assert trained == (WORK["warm_up"] + WORK["steps"]) * WORK["questions_per_step"] * WORK["answers_per_question"]
    assert (config.rollout.stop_token_ids == WORK["stop_token_ids"]) == (server == "sglang")


def test_the_digest_is_of_the_workload_too(tmp_path):
    other = tmp_path / "workload.json"
    other.write_text(json.dumps({**WORK, "steps": WORK["steps"] + 1}))
    assert rollout_modes.digest_of(other) != rollout_modes.digest_of(ROOT / "benchmarks" / "rollout_modes.json")
