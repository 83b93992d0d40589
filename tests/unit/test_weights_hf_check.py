"""Folders that lack tensors, or have too many: refused by name by trainer, converter, engines and evaluation alike."""

from __future__ import annotations

import json
import re

import pytest
import torch
from model_folders import broken, models
from safetensors.torch import load_file, save_file

from megatron_nft.cli import main
from megatron_nft.config import RolloutConfig
from megatron_nft.engines.embedded.engine import EmbeddedEngine
from megatron_nft.engines.engine import EngineError
from megatron_nft.engines.open import open_engine
from megatron_nft.policy.family import read_family
from megatron_nft.weights.hf_check import check_folder, check_model_folder
from megatron_nft.weights.hf_folder import HFFolder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return models(tmp_path_factory)


def renamed(tensors):
    for name in list(tensors):
        tensors[f"language_{name}"] = tensors.pop(name)


def without_layer(tensors):
    for name in [n for n in tensors if ".layers.2." in n]:
        del tensors[name]


FAULTS = {
    "no output layer": (lambda t: t.pop("lm_head.weight"), r"lacks lm_head\.weight"),
    "a missing layer": (without_layer, r"lacks model\.layers\.2\."),
    "another prefix": (renamed, r"lacks lm_head\.weight, .*does not know: language_lm_head\.weight"),
    "no bias": (lambda t: t.pop("model.layers.0.self_attn.q_proj.bias"), r"lacks .*q_proj\.bias"),
    "one too many": (lambda t: t.update({"model.extra.weight": torch.ones(2)}), r"does not know: model\.extra\.weight"),
    "a layer too many": (
        lambda t: t.update({"model.layers.4.mlp.up_proj.weight": torch.ones(96, 64)}),
        r"does not know: model\.layers\.4\.mlp\.up_proj\.weight",
    ),
    "another shape": (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"model\.norm\.weight has shape \[3\]"),
}


@pytest.mark.parametrize(("change", "message"), FAULTS.values(), ids=FAULTS)
def test_every_engine_refuses_them_before_it_starts(model, tmp_path, change, message):
    folder = broken(model(), tmp_path / "m", change)
    for engine in ("embedded", "sglang", "vllm"):
        with pytest.raises(EngineError, match=message):
            open_engine(folder, RolloutConfig(engine=engine), precision="fp32", log_dir=tmp_path)
    with pytest.raises(ValueError, match=message):
        check_model_folder(folder)


@pytest.mark.parametrize("engine", ["embedded", "sglang", "vllm"])
@pytest.mark.parametrize(("change", "message"), FAULTS.values(), ids=FAULTS)
def test_an_evaluation_refuses_them_and_writes_nothing(model, tmp_path, capsys, change, message, engine):
    """Before the engine is started or even looked for."""
    folder = broken(model(), tmp_path / "m", change)
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"prompt": "1+1=", "answer": "2"}\n')
    given = ["eval", "--model", folder, "--benchmarks", questions, "--out", tmp_path / "out", "--engine", engine]
    assert main([*map(str, given), "--max-response-tokens", "8"]) == 2
    said = capsys.readouterr().err
    assert f"{folder} " in said and re.search(message, said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "add",
    [
        lambda t: {"lm_head.weight": t["model.embed_tokens.weight"].clone()},
        lambda t: {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)},
        lambda t: {"model.rotary_emb.inv_freq": torch.ones(8)},
        lambda t: {},
        lambda t: {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(4)},
    ],
)
def test_what_may_be_there_too(model, tmp_path, add):
    folder = broken(model("qwen2", True), tmp_path / "m", lambda t: t.update(add(t)))
    assert check_model_folder(folder) is None
    open_engine(folder, RolloutConfig(), precision="fp32", log_dir=tmp_path).close()


def test_a_tied_output_layer_that_differs_is_refused(model, tmp_path):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    folder = broken(model("qwen2", True), tmp_path / "m", change)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        check_model_folder(folder)


@pytest.mark.parametrize(("change", "message"), FAULTS.values(), ids=FAULTS)
def test_a_rope_scaling_that_is_not_trained_here_hides_no_fault(model, tmp_path, change, message):
    """It changes no tensor, and long-context folders have it."""
    yarn = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0}
    folder = broken(model(), tmp_path / "m", change)
    whole = broken(model(), tmp_path / "whole", lambda tensors: None)
    for path in (folder, whole):
        config = json.loads((path / "config.json").read_text())
        config.pop("rope_scaling", None)
        (path / "config.json").write_text(json.dumps({**config, "rope_parameters": yarn}))
    assert check_model_folder(whole) is None
    with pytest.raises(ValueError, match=message):
        check_model_folder(folder)


def test_a_config_that_is_not_known_leaves_the_engine_to_look(model, tmp_path):
    """The table of names is not asked, and transformers says what it did not find."""
    folder = broken(model(), tmp_path / "m", lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "partial_rotary_factor": 0.5}))
    assert "were not compared with its config" in (check_model_folder(folder) or "")
    with pytest.raises(EngineError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        EmbeddedEngine.create(folder)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([1], r"1 of 2 weight files are missing \(model-00002-of-00002\.safetensors\)"),
        ([2], r"1 of 2 weight files are missing \(model-00001-of-00002\.safetensors\)"),
        ([], r"2 of 2 weight files are missing \(model-00001-of-00002\.safetensors, model-00002"),
    ],
)
def test_a_shard_that_the_index_names_and_the_folder_lacks(model, tmp_path, kept, message, capsys):
    folder = broken(model(), tmp_path / "m", lambda t: None)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for part in (1, 2):
        file = f"model-0000{part}-of-00002.safetensors"
        weight_map |= dict.fromkeys(names[part - 1 :: 2], file)
        if part in kept:
            save_file({name: tensors[name] for name in names[part - 1 :: 2]}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(ValueError, match=message):
        HFFolder(folder)
    out = tmp_path / "out"
    assert main(["convert", "hf-to-megatron", str(folder), str(out)]) == 1
    assert "weight files are missing" in capsys.readouterr().err and not out.exists()
    data = tmp_path / "q.jsonl"
    data.write_text('{"prompt": "1+1=", "answer": "2"}\n')
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps({
        "run_dir": str(tmp_path / "run"), "model": {"path": str(folder)}, "data": {"train": [str(data)]},
        "policy": {"precision": "fp32"}, "rollout": {"max_response_tokens": 100},
    }))  # fmt: skip
    assert main(["train", "--config", str(config)]) == 2
    assert "weight files are missing" in capsys.readouterr().err


def test_a_whole_folder_passes(model):
    check_folder(HFFolder(model()), read_family(model()))
