"""What a login node can see of a run that would be refused: launch_slurm/check.py, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_nft.cli import main

CHECK = Path(__file__).parents[2] / "launch_slurm" / "check.py"
SIZES = {
    "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 264, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.fixture
def settings(tmp_path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SIZES))
    (model / "tokenizer.json").write_text("{}")
    (tmp_path / "train.jsonl").write_text("{}")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps(SIZES))
    path = tmp_path / "c.yaml"
    values = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(model)},
        "data": {"train": [str(tmp_path / "train.jsonl")], "max_prompt_tokens": 64},
        "rollout": {"max_response_tokens": 64},
    }
    path.write_text(json.dumps(values))
    return path


ASK = """
import json, runpy, sys
path, ranks, *cases = sys.argv[1:]
check = runpy.run_path(path)["main"]
for case in cases:
    sys.argv = ["check.py", f"--ranks={ranks}", *json.loads(case)]
    print(check(), file=sys.stderr)
sys.exit("torch" in sys.modules)
"""


def test_the_check_of_a_job_refuses_what_the_run_would(settings, tmp_path):
    refused = {
        "rollout.max_response_tokens=65": "= 129 is more than the model's max_position_embeddings (128)",
        "policy.tensor_model_parallel_size=8": "tensor_model_parallel_size (8)",
        "model.architecture={vocab_size: 100}": "vocab_size is 100, config.json has 264",
        f"model.path={tmp_path / 'bare'}": "has no tokenizer",
        f"eval.data=[{tmp_path / 'none.jsonl'}]": "none.jsonl is not a file",
    }
    cases = [json.dumps(["--config", str(settings), override]) for override in ("seed=1", *refused)]
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(CHECK), "8", *cases], capture_output=True, text=True, timeout=300
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 0, f"torch was imported, or a case raised: {done.stderr}"
    assert lines[0] == "0" and lines[2::2] == ["2"] * len(refused), done.stderr
    for line, words in zip(lines[1::2], refused.values(), strict=True):
        assert line.startswith("nft: ") and words in line
    assert not (tmp_path / "run").exists()


def test_a_dry_run_knows_the_positions_of_a_model_that_is_elsewhere(settings, capsys):
    elsewhere = ["train", "--config", str(settings), "--dry-run", "model.path=/elsewhere"]
    architecture = f"model.architecture={json.dumps(SIZES)}"
    assert main([*elsewhere, "rollout.max_response_tokens=65"]) == 0  # nothing is known of it
    capsys.readouterr()
    assert main([*elsewhere, architecture, "rollout.max_response_tokens=65"]) == 2
    assert "= 129 is more than the model's max_position_embeddings (128)" in capsys.readouterr().err
    assert main([*elsewhere, architecture]) == 0
