"""Model folders for tests of the converters: made once per test session's module, and broken on purpose."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from tiny import make_model

VOCAB = 263  # odd: TP 2 pads it
VICTIM = "model.layers.1.mlp.up_proj.weight"


def models(tmp_path_factory):
    """family, tied -> a model folder, made once."""
    made: dict[tuple[str, bool], Path] = {}

    def get(family="qwen2", tied=False) -> Path:
        if (family, tied) not in made:
            folder = tmp_path_factory.mktemp("models") / f"{family}-{tied}"
            made[family, tied] = make_model(folder, family, tied=tied, layers=4, ffn=96, vocab=VOCAB)
        return made[family, tied]

    return get


def broken(model: Path, folder: Path, change) -> Path:
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def edit_metadata(folder: Path, change) -> None:
    """`change` edits a checkpoint's .metadata."""
    from megatron_nft.policy.checkpoint_metadata import read_metadata

    metadata = read_metadata(folder)
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
