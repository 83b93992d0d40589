"""What the conversions refuse, before anything is written: folders and checkpoints that are damaged or disagree."""

from __future__ import annotations

import json

import pytest
import torch
from model_folders import VICTIM, broken, edit_metadata, models

from megatron_nft.weights.hf_folder import HFFolder
from megatron_nft.weights.offline.convert import hf_to_megatron, megatron_to_hf
from megatron_nft.weights.offline.diff import compare, open_weights
from megatron_nft.weights.offline.megatron_reader import MegatronCheckpoint, MegatronWeights
from megatron_nft.weights.offline.megatron_writer import TargetLayout
from megatron_nft.weights.offline.reshard import reshard


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return models(tmp_path_factory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(VICTIM), f"lacks {VICTIM}"),
        (lambda t: t.update({"model.layers.9.extra": torch.ones(1)}), r"does not know: model\.layers\.9\.extra"),
        (lambda t: t.update({VICTIM: torch.ones(4, 4)}), rf"{VICTIM} has shape \[4, 4\], but config.json makes it"),
    ],
)
def test_a_folder_that_disagrees_with_its_config_is_refused(model, tmp_path, change, message):
    source = broken(model(), tmp_path / "source", change)
    with pytest.raises(ValueError, match=message):
        hf_to_megatron(source, tmp_path / "out", TargetLayout(1, 1, 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_config_of_another_size_is_refused(model, tmp_path):
    source = broken(model(), tmp_path / "source", lambda tensors: None)
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": 3}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"does not know: model\.layers\.3\."):
        hf_to_megatron(source, tmp_path / "out", TargetLayout(1, 1, 1))
    hf_to_megatron(model(), tmp_path / "megatron", TargetLayout(1, 1, 1))
    with pytest.raises(ValueError, match="has 4 layers, the config 3"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", hf_files=source)
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4, "intermediate_size": 97}))
    with pytest.raises(ValueError, match=r"linear_fc1\.weight has shape \[4, 192, 64\]"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", hf_files=source)
    assert not (tmp_path / "hf").exists() and not (tmp_path / "out").exists()


def test_missing_and_unknown_parameters_of_a_checkpoint_are_named(model, tmp_path):
    hf_to_megatron(model(), tmp_path / "megatron", TargetLayout(1, 1, 1))
    checkpoint = MegatronCheckpoint(tmp_path / "megatron")
    checkpoint.shapes["decoder.layers.mlp.gate.weight"] = (4, 1)
    with pytest.raises(ValueError, match=r"does not know: decoder\.layers\.mlp\.gate\.weight"):
        MegatronWeights(checkpoint, checkpoint.spec())
    del checkpoint.shapes["decoder.layers.mlp.gate.weight"], checkpoint.shapes["output_layer.weight"]
    with pytest.raises(ValueError, match=r"lacks output_layer\.weight \(for lm_head\.weight\)"):
        MegatronWeights(checkpoint, checkpoint.spec())


def test_resharding_refuses_before_it_writes(model, tmp_path):
    hf_to_megatron(model(), tmp_path / "megatron", TargetLayout(1, 1, 1))
    config = tmp_path / "megatron" / "hf" / "config.json"
    true = config.read_text()

    def refused(message: str, pp: int = 1) -> None:
        with pytest.raises(ValueError, match=message):
            reshard(tmp_path / "megatron", tmp_path / "out", TargetLayout(1, pp, 1))
        assert not list(tmp_path.glob("out*"))

    config.write_text(json.dumps(json.loads(true) | {"num_hidden_layers": 3}))
    refused("has 4 layers, the config 3")
    config.write_text(json.dumps(json.loads(true) | {"intermediate_size": 97}))
    refused(r"linear_fc1\.weight has shape \[4, 192, 64\]")
    config.write_text(true)
    refused(r"--pp 3 x --vpp 1 must divide the model's num_hidden_layers \(4\)", pp=3)

    def rename(metadata):
        entry = metadata.state_dict_metadata["output_layer.weight"]
        metadata.state_dict_metadata["optimizer.state.exp_avg.decoder.layers.mlp.gate.weight"] = entry

    edit_metadata(tmp_path / "megatron", rename)
    refused(r"holds optimizer\.state\.exp_avg\.decoder\.layers\.mlp\.gate\.weight, which belongs to no parameter")


def test_a_tied_folder_without_the_embedding_is_refused(model, tmp_path):
    def keep_head(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    only_head = broken(model("qwen2", True), tmp_path / "head", keep_head)
    with pytest.raises(ValueError, match=r"lacks model\.embed_tokens\.weight"):
        hf_to_megatron(only_head, tmp_path / "out", TargetLayout(1, 1, 1))


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        (
            {"tie_word_embeddings": True},
            r"tie_word_embeddings, but output_layer\.weight differs from embedding\.word",
        ),
        ({"vocab_size": 262}, "has 264 rows, the config's vocab_size is 262, and the rows beyond it are no padding"),
        ({"vocab_size": 265}, r"shape \[264, 64\], which does not hold model\.embed_tokens\.weight of the config's"),
        (
            {"head_dim": 8},
            r"linear_qkv\.weight has shape \[4, 128, 64\], which does not hold model\.layers\.0",
        ),
        (
            {"num_experts": 3, "num_local_experts": 3},
            r"router\.weight has shape \[4, 4, 64\], which does not hold",
        ),
    ],
)
def test_a_carried_config_that_disagrees_is_refused(model, tmp_path, figures, message):
    hf_to_megatron(model("qwen3_moe"), tmp_path / "megatron", TargetLayout(2, 1, 1))  # 263 rows, padded to 264
    config = tmp_path / "megatron" / "hf" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | figures))
    for work in (megatron_to_hf, lambda source, out: reshard(source, out, TargetLayout(1, 1, 1))):
        with pytest.raises(ValueError, match=message):
            work(tmp_path / "megatron", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_tensors_that_megatron_joins_must_share_a_dtype(model, tmp_path):
    def narrow(tensors):
        for name in (VICTIM, "model.norm.weight"):  # the norm is alone in its parameter
            tensors[name] = tensors[name].bfloat16()

    mixed = broken(model(), tmp_path / "mixed", narrow)
    with pytest.raises(
        ValueError, match=rf"and {VICTIM} torch\.bfloat16, but Megatron keeps both in decoder\.layers\."
    ):
        hf_to_megatron(mixed, tmp_path / "out", TargetLayout(1, 1, 1))
    assert not list(tmp_path.glob("out*"))
    hf_to_megatron(mixed, tmp_path / "out", TargetLayout(1, 1, 1), dtype=torch.float32)
    assert all(row.same for row in compare(open_weights(mixed), open_weights(tmp_path / "out")))

    def narrow_norm(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()

    hf_to_megatron(broken(model(), tmp_path / "alone", narrow_norm), tmp_path / "kept", TargetLayout(1, 1, 1))
    megatron_to_hf(tmp_path / "kept", tmp_path / "hf")
    assert HFFolder(tmp_path / "hf").dtypes == HFFolder(tmp_path / "alone").dtypes

    double = broken(model(), tmp_path / "double", lambda t: t.update({VICTIM: t[VICTIM].double()}))
    with pytest.raises(ValueError, match=rf"{VICTIM} is torch\.float64; .* float32, bfloat16 or float16"):
        hf_to_megatron(double, tmp_path / "never", TargetLayout(1, 1, 1))


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        (".metadata", 100, r"\.metadata is damaged: "),
        (".metadata", 0, r"\.metadata is damaged: Ran out of input"),
        ("__1_0.distcp", None, r"__1_0\.distcp is missing; \.metadata lists it"),
        ("__1_0.distcp", 100, r"__1_0\.distcp is cut off: it has 100 bytes, \.metadata lists \d+"),
        ("common.pt", 100, r"common\.pt is damaged: "),
    ],
)
def test_a_damaged_checkpoint_is_refused_before_anything_is_written(model, tmp_path, name, size, message):
    hf_to_megatron(model(), tmp_path / "megatron", TargetLayout(2, 1, 1))
    file = tmp_path / "megatron" / name
    data = file.read_bytes()
    file.unlink()
    if size is not None:
        file.write_bytes(data[:size])
    with pytest.raises(ValueError, match=message):
        reshard(tmp_path / "megatron", tmp_path / "out", TargetLayout(1, 1, 1))
    assert not list(tmp_path.glob("out*"))


def test_pickles_truncated_files_and_wrong_indices_are_refused(model, tmp_path):
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin, which are pickles and are not read"):
        HFFolder(tmp_path / "pickles")
    cut = broken(model(), tmp_path / "cut", lambda tensors: None)
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="is damaged or cut off"):
        HFFolder(cut)
    listed = broken(model(), tmp_path / "listed", lambda tensors: None)
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "other.safetensors"}}
    (listed / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"1 of 1 weight files are missing \(other\.safetensors\)"):
        HFFolder(listed)
    index["weight_map"] = {"model.nrom.weight": "model.safetensors"}
    (listed / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"lists tensors that its files do not hold: model\.nrom\.weight"):
        HFFolder(listed)
    (listed / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is no index of safetensors"):
        HFFolder(listed)


def test_a_stored_copy_of_a_tied_output_layer_must_be_equal(model, tmp_path):
    def copy_plus(number):
        return lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + number})

    equal = broken(model("qwen2", True), tmp_path / "equal", copy_plus(0))
    hf_to_megatron(equal, tmp_path / "out", TargetLayout(1, 1, 1))
    other = broken(model("qwen2", True), tmp_path / "other", copy_plus(1))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        hf_to_megatron(other, tmp_path / "never", TargetLayout(1, 1, 1))
