"""Prompts and answers that a model has no positions for: refused by a run, a dry run and a plan."""

from __future__ import annotations

import json

import pytest

from megatron_nft.cli import main
from megatron_nft.config import Config
from megatron_nft.data.synthetic import write_model, write_task
from megatron_nft.policy.family import spec_from_config
from megatron_nft.policy.positions import check_positions
from megatron_nft.policy.rope import UnsupportedModelError

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


SCALED_5 = {"max_position_embeddings": 131072, "rope_parameters": {**SCALED["rope_scaling"], "rope_theta": 500000.0}}
ORIGINAL_KEPT = {**SCALED, "max_position_embeddings": 8192}  # engines apply llama3's factor to no number of positions
NO_SCALING = {"rope_scaling": {"rope_type": "default", "factor": 4.0}}
QWEN3 = {"model_type": "qwen3", "max_position_embeddings": 40960, "head_dim": 16, "num_key_value_heads": 2}


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
        (SCALED_5, 1072, 130000, None, None),
        (SCALED_5, 1073, 130000, None, r"= 131073 .*\(131072\)"),
        (ORIGINAL_KEPT, 1024, 7168, None, None),
        (ORIGINAL_KEPT, 1024, 7169, None, r"= 8193 .*\(8192\)"),
        (NO_SCALING, 512, 3584, None, None),
        (NO_SCALING, 512, 3585, None, r"= 4097 .*\(4096\)"),
        (QWEN3, 512, 40448, None, None),
        (QWEN3, 513, 40448, None, r"= 40961 .*\(40960\)"),
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


@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic", "longrope"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_a_factor_that_would_multiply_the_positions_is_refused_itself(key, kind):
    """These kinds leave max_position_embeddings at what it was; none of them can be trained here."""
    with pytest.raises(UnsupportedModelError, match=rf"{key}\.rope_type is '{kind}'; allowed: 'default', 'llama3'"):
        spec_from_config({**LLAMA, key: {"rope_type": kind, "factor": 4.0}})


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
