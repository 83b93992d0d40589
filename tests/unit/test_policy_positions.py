"""Prompts and answers that a model has no positions for: refused by a run, a dry run and a plan."""

from __future__ import annotations

import json

import pytest

from megatron_nft.cli import main
from megatron_nft.config import Config
from megatron_nft.data.synthetic import write_model, write_task
from megatron_nft.policy.family import spec_from_config
from megatron_nft.policy.positions import check_positions

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "max_position_embeddings": 4096,
}
SCALED = {
    "max_position_embeddings": 131072,  # counts scaled positions already
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


@pytest.mark.parametrize(
    ("model", "prompt", "response", "evaluation", "problem"),
    [
        ({}, 512, 3584, None, None),
        ({}, 512, 3585, None, r"\(512\) \+ rollout\.max_response_tokens \(3585\) = 4097 .*embeddings \(4096\)"),
        ({}, 4095, 1, None, None),
        ({}, 4096, 1, None, r"= 4097 "),
        ({}, 512, 1024, 3585, r"\+ eval\.max_response_tokens \(3585\) = 4097"),
        ({}, 512, 1024, 3584, None),
        (SCALED, 1072, 130000, None, None),
        (SCALED, 1073, 130000, None, r"= 131073 .*\(131072\)"),
    ],
)
def test_the_longest_sequence_must_have_positions(tmp_path, model, prompt, response, evaluation, problem):
    config = Config(
        run_dir=tmp_path,
        model={"path": tmp_path},
        policy={"micro_batch_tokens": 200000},
        data={"train": [tmp_path], "max_prompt_tokens": prompt},
        rollout={"max_response_tokens": response},
        eval={"data": [tmp_path], "max_response_tokens": evaluation},
    )
    spec = spec_from_config(LLAMA | model)
    if problem is None:
        check_positions(spec, config)
    else:
        with pytest.raises(ValueError, match=problem):
            check_positions(spec, config)


def test_run_dry_run_and_plan_refuse_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("megatron_nft.train.launch.start_local", lambda *_: pytest.fail("ranks were started"))
    train, _ = write_task(tmp_path / "task", num_train=5, num_held_out=2)
    model = write_model(tmp_path / "model")  # 128 positions
    settings = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(model)},
        "policy": {"precision": "fp32"},
        "data": {"train": [str(train)], "max_prompt_tokens": 64},
        "rollout": {"max_response_tokens": 65},
    }
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps(settings))
    plan = ["plan", "--config", str(config), "--gpu", "cpu", "--gpus-per-node", "1"]
    for command in (["train", "--config", str(config)], ["train", "--config", str(config), "--dry-run"], plan):
        assert main(command) == 2
        assert "= 129 is more than the model's max_position_embeddings (128)" in capsys.readouterr().err
    assert main([*plan, "rollout.max_response_tokens=64"]) in (0, 1)
    assert main(["train", "--config", str(config), "--dry-run", "rollout.max_response_tokens=64"]) == 0
