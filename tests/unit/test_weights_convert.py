"""The conversions: round trips, resharding, memory, comparison."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_folders import VICTIM, VOCAB, broken, edit_metadata, models
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, make_model
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_nft.weights.hf_folder import HFFolder
from megatron_nft.weights.offline.convert import hf_to_megatron, megatron_to_hf
from megatron_nft.weights.offline.diff import compare, open_weights
from megatron_nft.weights.offline.megatron_reader import MegatronCheckpoint, MegatronWeights
from megatron_nft.weights.offline.megatron_writer import TargetLayout
from megatron_nft.weights.offline.reshard import reshard

CASES = [(family, tied) for family in FAMILIES for tied in (True, False)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return models(tmp_path_factory)


@pytest.mark.parametrize(("family", "tied"), CASES)
@pytest.mark.parametrize(
    "grid", [TargetLayout(1, 1, 1), TargetLayout(2, 2, 1), TargetLayout(2, 1, 1), TargetLayout(1, 2, 2)]
)
def test_round_trip_is_bit_identical(model, tmp_path, family, tied, grid):
    source = model(family, tied)
    hf_to_megatron(source, tmp_path / "megatron", grid)
    assert len(list((tmp_path / "megatron").glob("*.distcp"))) == grid.tp * grid.pp
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", max_file_bytes=200_000)
    before, after = HFFolder(source), HFFolder(tmp_path / "hf")
    assert after.shapes == before.shapes and after.dtypes == before.dtypes
    assert all(torch.equal(after.read(name), before.read(name)) for name in before.shapes)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert json_or_text(tmp_path / "hf" / name) == json_or_text(source / name), name


def json_or_text(path: Path):
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else text


def test_sharded_folder_has_an_index_that_transformers_reads(model, tmp_path):
    from transformers import AutoModelForCausalLM

    hf_to_megatron(model(), tmp_path / "megatron", TargetLayout(2, 2, 1))
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", max_file_bytes=200_000)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 1 and sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in load_file(model() / "model.safetensors").values())
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = load_file(model() / "model.safetensors")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in expected.items())


def test_dtype_of_tensors_and_config_follow_the_choice(model, tmp_path):
    hf_to_megatron(model(), tmp_path / "megatron", TargetLayout(1, 1, 1), dtype=torch.bfloat16)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf")
    source, written = HFFolder(model()), HFFolder(tmp_path / "hf")
    assert set(written.dtypes.values()) == {torch.bfloat16}
    assert all(torch.equal(written.read(name), source.read(name).bfloat16()) for name in source.shapes)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    megatron_to_hf(tmp_path / "megatron", tmp_path / "wide", dtype=torch.float32)
    wide = HFFolder(tmp_path / "wide")
    assert all(torch.equal(wide.read(name), source.read(name).bfloat16().float()) for name in source.shapes)


def test_a_checkpoint_with_norms_under_the_local_specs_names_is_read(model, tmp_path):
    """A local spec that does not rename its norms stores `input_layernorm.weight`; both kinds are read."""
    hf_to_megatron(model(), tmp_path / "megatron", TargetLayout(1, 1, 1))
    checkpoint = MegatronCheckpoint(tmp_path / "megatron")
    renames = {
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": "decoder.layers.input_layernorm.weight",
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": "decoder.layers.pre_mlp_layernorm.weight",
    }
    for old, new in renames.items():
        for table in (checkpoint.shapes, checkpoint.dtypes, checkpoint._chunks):
            table[new] = table.pop(old)
        checkpoint._stored |= {(new, at): info for (key, at), info in checkpoint._stored.items() if key == old}
    weights = MegatronWeights(checkpoint, checkpoint.spec())
    name = "model.layers.2.post_attention_layernorm.weight"
    assert torch.equal(weights.read(name), HFFolder(model()).read(name))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("first", "then"), [((1, 1, 1), (2, 2, 1)), ((2, 1, 1), (1, 1, 1))])
def test_resharding_pads_the_vocabulary_as_the_new_layout_does(model, tmp_path, tied, first, then):
    """263 rows are 264 in TP 2; none is lost, and padding is zero."""
    source = model("qwen2", tied)
    hf_to_megatron(source, tmp_path / "first", TargetLayout(*first))
    reshard(tmp_path / "first", tmp_path / "then", TargetLayout(*then))
    checkpoint = MegatronCheckpoint(tmp_path / "then")
    rows = VOCAB + (then[0] == 2)
    found = checkpoint.read("embedding.word_embeddings.weight")
    expected = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    assert found.shape == (rows, 64) and torch.equal(found[:VOCAB], expected) and not found[VOCAB:].any()
    assert all(row.same for row in compare(open_weights(source), open_weights(tmp_path / "then")))


def test_pickled_objects_of_a_checkpoint_are_not_read(model, tmp_path):
    """Megatron with Transformer Engine stores FP8 states so: no weights, but a reshard would lose them."""
    hf_to_megatron(model(), tmp_path / "megatron", TargetLayout(2, 1, 1))
    key = "decoder.layers.self_attention.core_attention._extra_state/shard_0_4"
    edit_metadata(tmp_path / "megatron", lambda m: m.state_dict_metadata.update({key: BytesStorageMetadata()}))
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf")
    assert all(row.same for row in compare(open_weights(model()), open_weights(tmp_path / "hf")))
    with pytest.raises(ValueError, match=r"holds pickled objects, which are not read: decoder\.layers\.self_attention"):
        reshard(tmp_path / "megatron", tmp_path / "out", TargetLayout(1, 1, 1))
    assert not (tmp_path / "out.partial").exists()


PEAK = """
import ctypes, re, sys, warnings
warnings.filterwarnings("ignore")
from pathlib import Path
from megatron_nft.weights.offline.convert import hf_to_megatron, megatron_to_hf
from megatron_nft.weights.offline.megatron_writer import TargetLayout
from megatron_nft.weights.offline.reshard import reshard
small, large, cut_small, out = map(Path, sys.argv[1:5])

def status(key): return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def extra(work):
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before does not serve again
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak, starts again from here
    before = status("VmRSS")
    work()
    return status("VmHWM") - before

def all_ways(source, to, there, then):
    yield extra(lambda: hf_to_megatron(source, to / "m", TargetLayout(*there)))
    yield extra(lambda: reshard(to / "m", to / "r", TargetLayout(*then)))
    yield extra(lambda: megatron_to_hf(to / "r", to / "hf", max_file_bytes=20_000_000))

for source, layouts in ((large, ((2, 2, 1), (1, 2, 2))), (cut_small, ((1, 1, 1), (2, 1, 1)))):
    list(all_ways(small, out / source.name / "small", *layouts))  # loads all code
    print(*all_ways(source, out / source.name / "large", *layouts))
"""


def cut_into_files(whole: Path, folder: Path, max_bytes: int) -> list[int]:
    """The tensors of `whole` in files of at most `max_bytes`, or of one tensor; the sizes of the files."""
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(whole / name, folder / name)
    groups: list[dict[str, torch.Tensor]] = []
    for name, tensor in load_file(whole / "model.safetensors").items():
        if not groups or sum(t.nbytes for t in groups[-1].values()) + tensor.nbytes > max_bytes:
            groups.append({})
        groups[-1][name] = tensor
    for i, tensors in enumerate(groups):
        save_file(tensors, folder / f"part-{i}.safetensors", {"format": "pt"})
    return [file.stat().st_size for file in folder.glob("*.safetensors")]


def test_memory_is_bounded_by_a_file_and_a_bucket(model, tmp_path):
    """140 MB through TP 2 PP 2 from files of at most 20 MB, and through TP 1 from files of a tensor or a few. What the
    process holds beyond its code, mapped pages of files included, is at most two of the largest parameter in every
    direction (1.0 to 1.3 were measured), which is no more than the largest file and a bucket of one parameter."""
    whole = make_model(tmp_path / "whole", "qwen2", tied=False, hidden=512, layers=8, ffn=2048, vocab=4096)
    files = {name: cut_into_files(whole, tmp_path / name, size) for name, size in (("large", 20 << 20), ("cut", 1))}
    paths = [model(), *(tmp_path / name for name in files), tmp_path / "out"]
    done = subprocess.run([sys.executable, "-c", PEAK, *map(str, paths)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    parameter = 4096 * 512 * 4  # the embedding; gate and up of a layer make as much
    assert sum(files["large"]) > 8 * 2 * parameter and max(files["cut"]) < 1.1 * parameter
    for (name, sizes), line in zip(files.items(), done.stdout.splitlines(), strict=True):
        peaks = [int(number) for number in line.split()]  # to Megatron, resharding, back
        assert max(peaks) <= 2 * parameter <= max(sizes) + parameter, (name, peaks, max(sizes), parameter)
        assert all(row.same for row in compare(open_weights(whole), open_weights(tmp_path / "out" / name / "large/hf")))


def test_compare_tells_what_differs(model, tmp_path):
    def change(tensors):
        tensors[VICTIM][3, 5] += 0.25
        tensors["model.norm.weight"] = tensors["model.norm.weight"].double()
        del tensors["lm_head.weight"]

    other = broken(model(), tmp_path / "other", change)
    rows = {row.name: row for row in compare(open_weights(model()), open_weights(other)) if not row.same}
    assert set(rows) == {VICTIM, "lm_head.weight"}
    assert rows[VICTIM].max_difference == pytest.approx(0.25, rel=1e-5)
    assert rows[VICTIM].checksums[0] != rows[VICTIM].checksums[1]
    assert rows["lm_head.weight"].shapes[1] is None and rows["lm_head.weight"].max_difference is None


def test_nan_is_not_equal_to_a_number(model, tmp_path):
    other = broken(model(), tmp_path / "other", lambda t: t[VICTIM].__setitem__((0, 0), float("nan")))
    rows = [row for row in compare(open_weights(model()), open_weights(other)) if not row.same]
    assert [row.name for row in rows] == [VICTIM]
