"""Folders that lack tensors, or have too many: refused by name by trainer, converter, engines and evaluation alike."""

from __future__ import annotations

import functools
import json
import re

import pytest
import torch
from model_folders import broken, models
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_nft.cli import main
from megatron_nft.config import RolloutConfig
from megatron_nft.engines.embedded.engine import EmbeddedEngine
from megatron_nft.engines.engine import EngineError
from megatron_nft.engines.open import open_engine
from megatron_nft.policy.family import read_family
from megatron_nft.weights.hf_check import check_folder, check_model_folder
from megatron_nft.weights.hf_folder import HFFolder
from megatron_nft.weights.hf_loading import loading_problems


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


def test_a_value_that_is_not_trained_here_hides_no_fault(model, tmp_path):
    """The table of names is not asked, but transformers is."""
    folder = broken(model(), tmp_path / "m", lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "partial_rotary_factor": 0.5}))
    for check in (check_model_folder, EmbeddedEngine.create):
        with pytest.raises((ValueError, EngineError), match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
            check(folder)


OTHER_FAMILIES = {
    "gpt2": {"n_layer": 3, "n_embd": 32, "n_head": 4, "n_positions": 64},
    "phi3": {"pad_token_id": 0, "num_key_value_heads": 2},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
}
SIZES = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.fixture(scope="module")
def other_family(tmp_path_factory):
    """model_type -> a folder of a family that cannot be trained here."""

    @functools.cache
    def make(model_type):
        sizes = ({} if model_type == "gpt2" else SIZES) | OTHER_FAMILIES[model_type]
        config = AutoConfig.for_model(model_type, vocab_size=99, bos_token_id=1, eos_token_id=2, **sizes)
        folder = tmp_path_factory.mktemp("other") / model_type
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return folder

    return make


def lacks(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


EXPERT = "model.layers.2.block_sparse_moe.experts.1.w3.weight"
OTHER_FAULTS = [
    ("phi3", lacks("lm_head.weight"), r"lacks lm_head\.weight"),
    ("phi3", without_layer, r"lacks model\.layers\.2\.input_layernorm\.weight"),
    ("phi3", lacks("model.layers.1.self_attn.qkv_proj.weight"), r"lacks model\.layers\.1\.self_attn\.qkv_proj"),
    ("phi3", renamed, r"lacks lm_head\.weight, .*does not know: language_lm_head\.weight"),
    ("phi3", lambda t: t.update({"model.extra.weight": torch.ones(2)}), r"does not know: model\.extra\.weight"),
    ("phi3", lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"norm\.weight has shape \[3\], .* it \[32\]"),
    ("gpt2", lacks("transformer.h.1.mlp.c_proj.weight"), r"lacks transformer\.h\.1\.mlp\.c_proj\.weight"),
    (
        "gpt2",
        lambda t: t.update({"lm_head.weight": torch.ones(99, 32)}),
        r"lm_head\.weight differs from transformer\.wte",
    ),
    ("mixtral", lacks(EXPERT), rf"lacks {re.escape(EXPERT)}"),
    ("mixtral", lambda t: t.update({EXPERT: torch.ones(3)}), rf"{re.escape(EXPERT)} has shape \[3\].* it \[48, 32\]"),
    (
        "mixtral",
        lambda t: t.update({f"{EXPERT}.x": torch.ones(3)}),
        r"does not know: model\.layers\.2\.mlp\.experts\.gate_up_proj\.x",
    ),
]


@pytest.mark.parametrize(("family", "change", "message"), OTHER_FAULTS)
def test_a_family_without_a_table_is_refused_by_name_too(other_family, tmp_path, family, change, message):
    folder = broken(other_family(family), tmp_path / "m", change)
    with pytest.raises(ValueError, match=message):
        check_model_folder(folder)
    for engine in ("embedded", "sglang", "vllm"):
        with pytest.raises(EngineError, match=message):
            open_engine(folder, RolloutConfig(engine=engine), precision="fp32", log_dir=tmp_path)


@pytest.mark.parametrize(
    ("family", "add"),
    [
        ("gpt2", lambda t: {}),
        ("gpt2", lambda t: {"lm_head.weight": t["transformer.wte.weight"].clone()}),
        ("gpt2", lambda t: {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64)}),  # older versions wrote the mask
        ("phi3", lambda t: {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
        ("mixtral", lambda t: {}),
    ],
)
def test_a_whole_folder_of_a_family_without_a_table_passes(other_family, tmp_path, family, add):
    assert check_model_folder(broken(other_family(family), tmp_path / "m", lambda t: t.update(add(t)))) is None


def test_former_names_that_transformers_knows_pass(other_family, tmp_path):
    def former(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    assert check_model_folder(broken(other_family("gpt2"), tmp_path / "m", former)) is None


def test_what_is_missing_is_not_filled(other_family, monkeypatch):
    """A model of many billions of parameters would not fit, and would take minutes."""
    fill = torch.Tensor.normal_

    def fill_without_data(tensor, *args, **kwargs):
        assert tensor.device.type == "meta"
        return fill(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "normal_", fill_without_data)
    folder = HFFolder(other_family("phi3"))
    folder.shapes = {f"language_{name}": shape for name, shape in folder.shapes.items()}
    folder.dtypes = {f"language_{name}": dtype for name, dtype in folder.dtypes.items()}
    assert len(loading_problems(folder)) == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "made_up"}, "transformers does not know the model"),
        ({"architectures": ["MadeUpForCausalLM"]}, r"architectures in config\.json is \['MadeUpForCausalLM'\]"),
        ({"architectures": None}, r"architectures in config\.json is \[\]"),
        ({"quantization_config": {"quant_method": "fp8"}}, "its weights are quantized"),
    ],
)
def test_a_model_that_only_the_engine_knows_is_left_to_it(other_family, tmp_path, change, reason):
    folder = broken(other_family("phi3"), tmp_path / "m", lacks("lm_head.weight"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    assert re.search(f"were not compared with its config: .*{reason}", check_model_folder(folder) or "")


def shard(number, count):
    return f"model-{number:05}-of-{count:05}.safetensors"


def sharded(folder, count):
    """Cut the folder's one file into `count` and write their index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for part in range(count):
        own = {name: tensors[name] for name in names[part::count]}
        save_file(own, folder / shard(part + 1, count), {"format": "pt"})
    weight_map = {name: shard(index % count + 1, count) for index, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def without(*numbers):
    def remove(folder, count):
        for number in numbers:
            (folder / shard(number, count)).unlink()

    return remove


def dangling(folder, count):
    """What a hub's cache holds of a download that stopped half-way."""
    (folder / shard(2, count)).unlink()
    (folder / shard(2, count)).symlink_to(folder / "blobs" / "0123abcd")


def not_a_file(folder, count):
    (folder / shard(2, count)).unlink()
    (folder / shard(2, count)).mkdir()


def still_coming(folder, count):
    (folder / shard(2, count)).rename(folder / (shard(2, count) + ".incomplete"))


def in_a_folder(folder, count):
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(shard(1, count), f"weights/{shard(1, count)}"))


@pytest.mark.parametrize(
    ("count", "damage", "message"),
    [
        (2, without(2), rf"1 of 2 weight files are missing \({shard(2, 2)}\)"),
        (2, without(1), rf"1 of 2 weight files are missing \({shard(1, 2)}\)"),
        (2, without(1, 2), rf"2 of 2 weight files are missing \({shard(1, 2)}, {shard(2, 2)}"),
        (5, without(2, 4), rf"2 of 5 weight files are missing \({shard(2, 5)}, {shard(4, 5)}\)"),
        (7, without(1, 2, 3, 4, 5, 6), rf"6 of 7 weight files are missing \({shard(1, 7)}, .* and 2 more\)"),
        (3, dangling, rf"1 of 3 weight files are missing \({shard(2, 3)}\)"),
        (3, not_a_file, rf"1 of 3 weight files are missing \({shard(2, 3)}\)"),
        (3, still_coming, rf"1 of 3 weight files are missing \({shard(2, 3)}\)"),
        (2, in_a_folder, rf"1 of 2 weight files are missing \(weights/{shard(1, 2)}\)"),
    ],
)
def test_a_shard_that_the_index_names_and_the_folder_lacks(model, tmp_path, count, damage, message, capsys):
    """Named by reader, converter, evaluation and trainer alike."""
    folder = broken(model(), tmp_path / "m", lambda t: None)
    sharded(folder, count)
    assert check_model_folder(folder) is None
    damage(folder, count)
    with pytest.raises(ValueError, match=message):
        HFFolder(folder)
    out, data, config = tmp_path / "out", tmp_path / "q.jsonl", tmp_path / "c.yaml"
    data.write_text('{"prompt": "1+1=", "answer": "2"}\n')
    config.write_text(json.dumps({
        "run_dir": str(tmp_path / "run"), "model": {"path": str(folder)}, "data": {"train": [str(data)]},
        "policy": {"precision": "fp32"}, "rollout": {"max_response_tokens": 100},
    }))  # fmt: skip
    commands = {
        ("convert", "hf-to-megatron", folder, out): 1,
        ("eval", "--model", folder, "--benchmarks", data, "--out", out, "--max-response-tokens", 8): 2,
        ("train", "--config", config): 2,
    }
    for command, status in commands.items():
        assert main([*map(str, command)]) == status
        assert re.search(message, capsys.readouterr().err) and not out.exists()


def test_a_whole_folder_passes(model):
    check_folder(HFFolder(model()), read_family(model()))
