"""Whether a model folder holds exactly the tensors that its config promises: the one check of trainer, converter,
engines and evaluation."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_nft.policy.family import ModelSpec, UnsupportedModelError, read_family, spec_from_config
from megatron_nft.weights.hf_folder import HFFolder, name_list
from megatron_nft.weights.hf_loading import COMPUTED, UnknownModelError, loading_problems
from megatron_nft.weights.names import Geometry, hf_shapes

OUTPUT, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def check_folder(folder: HFFolder, geometry: Geometry) -> None:
    """Compare a folder's tensors with what its config promises; ValueError names every difference.

    Two kinds of tensors may be there too: a tied output layer that equals the embedding, and `rotary_emb.inv_freq`.
    """
    expected = hf_shapes(geometry)
    found = {name: shape for name, shape in folder.shapes.items() if not name.endswith(COMPUTED)}
    if geometry.tied and OUTPUT in found:
        del found[OUTPUT]  # some folders store the tied output layer a second time
        if EMBEDDING in found and not folder.equal(OUTPUT, EMBEDDING):
            raise ValueError(
                f"{folder.path}: config.json says tie_word_embeddings, but {OUTPUT} differs from {EMBEDDING}"
            )
    problems = []
    if missing := expected.keys() - found.keys():
        problems.append(f"lacks {name_list(missing)}")
    if unknown := found.keys() - expected.keys():
        problems.append(f"holds tensors that family {geometry.family!r} does not know: {name_list(unknown)}")
    problems += [
        f"{name} has shape {list(found[name])}, but config.json makes it {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ][:10]
    if problems:
        raise ValueError(f"{folder.path} " + "; ".join(problems))


def check_model_folder(path: Path | str) -> str | None:
    """Check the tensors of the folder `path` before an engine reads it; ValueError names what is wrong.

    A model that cannot be trained here is compared with what transformers would load. Returns None, or why the tensors
    could not be compared: transformers does not know the model either, so that only the engine knows what it needs.
    """
    folder = HFFolder(path)
    try:
        spec: ModelSpec | None = read_family(path)
    except UnsupportedModelError:
        spec = _without_rope(Path(path))
    if spec is not None:
        check_folder(folder, spec)
        return None
    try:
        problems = loading_problems(folder)
    except UnknownModelError as error:
        return f"the tensors of {path} were not compared with its config: {error}"
    if problems:
        raise ValueError(f"{path} " + "; ".join(problems))
    return None


def _without_rope(path: Path) -> ModelSpec | None:
    """The model's sizes where only its RoPE scaling cannot be trained here, which changes no tensor; None else."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    try:
        return spec_from_config({k: v for k, v in config.items() if k not in ("rope_parameters", "rope_scaling")})
    except UnsupportedModelError:
        return None
