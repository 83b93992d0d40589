"""What a model is: complete or not, and the same or not."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from tiny import make_model
from transformers import AutoModelForCausalLM

from megatron_nft.evaluate.model_folder import ModelFolderError, identify_model, inspect_model, weight_bytes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "m", layers=1, hidden=32, tied=False)


@pytest.fixture
def copy(model, tmp_path):
    return shutil.copytree(model, tmp_path / "copy")


def test_size_is_that_of_transformers(model):
    parameters, positions = inspect_model(model)
    assert parameters == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model).parameters())
    assert positions == 2048


def test_a_copy_is_the_same_and_any_change_is_not(model, copy):
    original = identify_model(model)
    seen = []
    assert identify_model(copy, on_bytes=seen.append).checksum == original.checksum
    assert sum(seen) > weight_bytes(copy) > 0
    (copy / "README.md").write_text("not part of the model")
    assert identify_model(copy).checksum == original.checksum
    weights = load_file(copy / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1e-3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert identify_model(copy).checksum != original.checksum


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_config_and_tokenizer_belong_to_the_model(model, copy, name):
    path = copy / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {"note": 1}))
    assert identify_model(copy).checksum != identify_model(model).checksum


def test_incomplete_folders(copy, tmp_path):
    with pytest.raises(ModelFolderError, match="does not exist"):
        inspect_model(tmp_path / "absent")
    index = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / "model.safetensors").rename(copy / "model-1.safetensors")
    with pytest.raises(ModelFolderError, match=r"1 of 2 weight files are missing \(model-2\.safetensors\)"):
        inspect_model(copy)
    (copy / "model.safetensors.index.json").unlink()
    data = (copy / "model-1.safetensors").read_bytes()
    (copy / "model-1.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelFolderError, match="damaged or cut off"):
        inspect_model(copy)
    (copy / "model-1.safetensors").unlink()
    with pytest.raises(ModelFolderError, match=r"no \*\.safetensors"):
        inspect_model(copy)
    (copy / "config.json").write_text('{"max_position_embeddings": null}')
    with pytest.raises(ModelFolderError, match="max_position_embeddings is None"):
        inspect_model(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelFolderError, match="cannot be read"):
        inspect_model(copy)
    (copy / "config.json").unlink()
    with pytest.raises(ModelFolderError, match=r"has no config\.json"):
        inspect_model(copy)
