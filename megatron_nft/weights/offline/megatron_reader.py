"""Reading a Megatron checkpoint (torch_dist) region by region, without Megatron's ranks, whatever layout wrote it.

Tensors are stored by their place in the whole model: one key per kind of parameter, layers stacked along axis 0 (then
experts along axis 1), in boxes as the ranks held them (policy/checkpoint_reader.py).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megatron_nft.policy.checkpoint_reader import StoredTensors
from megatron_nft.policy.family import ModelSpec, read_family
from megatron_nft.weights.hf_folder import name_list
from megatron_nft.weights.names import Geometry, Kind, Place, all_places, hf_shapes
from megatron_nft.weights.splits import unmerge

MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")
HF_FILES = "hf"  # a converted checkpoint carries config and tokenizer in this folder
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
MASTER = "optimizer.state.param."  # fp32 copies of the weights in a training checkpoint


class MegatronCheckpoint(StoredTensors):
    """A checkpoint folder and the model that it is of. ValueError where it is no checkpoint or is damaged."""

    def __init__(self, path: Path | str) -> None:
        """`path`: the torch_dist folder itself, or one that holds it as `megatron/` (a run's `step_...` folder)."""
        self.path = Path(path)
        folder = self.path / "megatron" if (self.path / "megatron").is_dir() else self.path
        if not (folder / ".metadata").is_file():
            raise ValueError(f"{self.path} is no Megatron checkpoint: it has no .metadata file")
        super().__init__(folder)

    def spec(self) -> ModelSpec:
        """Return the model's sizes, from the carried config.json or from a run's manifest. ValueError without both."""
        if (self.folder / HF_FILES / "config.json").is_file():
            return read_family(self.folder / HF_FILES)
        manifest = self.path / "manifest.json"
        if not manifest.is_file():
            raise ValueError(f"{self.path} says nothing of its model (no {HF_FILES}/config.json, no manifest.json)")
        return ModelSpec.from_dict(json.loads(manifest.read_text(encoding="utf-8"))["model"])

    def read(self, key: str, start: tuple[int, ...] = ()) -> torch.Tensor:
        """Read the sub-tensor at the leading indices `start`, e.g. (layer,) of a key that stacks layers."""
        shape = self.shapes[key][len(start) :]
        lengths = (1,) * len(start) + shape
        offsets = start + (0,) * len(shape)
        return self.read_region(key, offsets, lengths).view(shape)

    def equal(self, key: str, other: str) -> bool:
        """Whether two matrices have the same shape and values, compared block by block."""
        if self.shapes[key] != self.shapes[other]:
            return False
        rows, width = self.shapes[key]
        blocks = [((start, 0), (min(1024, rows - start), width)) for start in range(0, rows, 1024)]
        return all(torch.equal(self.read_region(key, *block), self.read_region(other, *block)) for block in blocks)

    def read_region(self, key: str, offsets: tuple[int, ...], lengths: tuple[int, ...]) -> torch.Tensor:
        """Read the box at `offsets`. ValueError where a part of it is missing."""
        target = torch.empty(lengths, dtype=self.dtypes[key])
        self.read_region_into(target, key, offsets)
        return target


class MegatronWeights:
    """A checkpoint's weights under HF names: `shapes`, `dtypes` and `read(name)` as an `HFFolder` has them."""

    def __init__(self, checkpoint: MegatronCheckpoint, geometry: Geometry, *, masters: bool = False) -> None:
        """`masters`: take the optimizer's fp32 copies where the checkpoint has them.

        ValueError, naming them, for parameters that are missing, unknown, or not of the config's shape.
        """
        self._checkpoint, self._geometry = checkpoint, geometry
        self.path = checkpoint.path
        self.places = [place for place in all_places(geometry) if not place.row.tied_copy]
        self._where = {place: self._locate(place, masters) for place in self.places}
        self._check()
        self.shapes = hf_shapes(geometry)
        self.dtypes = {
            name: checkpoint.dtypes[self._where[place][0]] for place in self.places for name in place.hf_names
        }
        self._place_of = {name: place for place in self.places for name in place.hf_names}
        self._last: tuple[Place, dict[str, torch.Tensor]] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def read(self, name: str) -> torch.Tensor:
        """Read one full HF tensor. Tensors of one Megatron parameter are read fastest in succession."""
        place = self._place_of[name]
        if self._last is None or self._last[0] != place:
            self._last = (place, self.read_place(place))
        return self._last[1][name]

    def read_place(self, place: Place) -> dict[str, torch.Tensor]:
        """Return full tensors by HF name, all that one Megatron parameter holds."""
        parameter = torch.empty(megatron_shape(place, self._geometry), dtype=self.dtypes[place.hf_names[0]])
        self.read_parameter_into(parameter, place)
        parts = unmerge(place.row.kind, parameter, self._geometry)
        shapes = place.hf_shapes(self._geometry)
        return {
            name: part.reshape(shape).contiguous()
            for name, part, shape in zip(place.hf_names, parts, shapes, strict=True)
        }

    def read_parameter_into(self, target: torch.Tensor, place: Place) -> None:
        """Fill `target`, of the shape `megatron_shape` gives, with a whole Megatron parameter, in its own dtype."""
        key, start = self._where[place]
        offsets = start + (0,) * target.dim()
        self._checkpoint.read_region_into(target.view((1,) * len(start) + tuple(target.shape)), key, offsets)

    def _locate(self, place: Place, masters: bool) -> tuple[str, tuple[int, ...]]:
        """Return key and leading indices of a parameter. Keys with the layer written out are known as well."""
        indices = tuple(i for i in (place.layer, place.expert) if i is not None)
        # Before layers are stacked, a local spec writes its own norm names.
        own = tuple(name.replace("{layer}.", "") for name in place.row.megatron if "{expert}" not in name)
        for key in dict.fromkeys(place.row.stored_keys + own):
            flat = key.replace("decoder.layers.", f"decoder.layers.{place.layer}.")
            for candidate, start in ((key, indices), (flat, indices[1:])):
                master = MASTER + candidate
                if masters and master in self._checkpoint.shapes:
                    return master, start
                if candidate in self._checkpoint.shapes:
                    return candidate, start
        raise ValueError(f"{self.path} lacks {place.row.stored_keys[0]} (for {', '.join(place.hf_names)})")

    def _check(self) -> None:
        known = {key.removeprefix(MASTER) for key, _ in self._where.values()}
        known |= {key for place in all_places(self._geometry) for key in place.row.stored_keys}
        found = {key for key in self._checkpoint.shapes if key.startswith(MODEL_PREFIXES)}
        unknown = {key for key in found - known if not key.endswith("_extra_state")}
        if unknown:
            family = self._geometry.family
            raise ValueError(f"{self.path} holds parameters that family {family!r} does not know: {name_list(unknown)}")
        for place, (key, start) in self._where.items():
            shape, expected = self._checkpoint.shapes[key][len(start) :], megatron_shape(place, self._geometry)
            vocab = place.row.kind is Kind.VOCAB  # may be padded
            same = shape == expected or (vocab and shape[1:] == expected[1:] and shape[0] > expected[0])
            if not same or any(i >= n for i, n in zip(start, self._checkpoint.shapes[key])):
                raise ValueError(
                    f"{self.path}: {key} has shape {list(self._checkpoint.shapes[key])}, which does not hold "
                    f"{place.hf_names[0]} of the config's shape (parameter {list(expected)} at {list(start)})"
                )
        layers = {self._checkpoint.shapes[key][0] for key, start in self._where.values() if start}
        if layers - {self._geometry.num_layers, self._geometry.num_experts}:
            raise ValueError(f"{self.path} has {max(layers)} layers, the config {self._geometry.num_layers}")
        for place, (key, _) in self._where.items():
            if place.row.kind is Kind.VOCAB:
                self._check_padding(key)
        if self._geometry.tied and OUTPUT in found and not self._checkpoint.equal(OUTPUT, EMBEDDING):
            raise ValueError(
                f"{self.path}: config.json says tie_word_embeddings, but {OUTPUT} differs from {EMBEDDING}"
            )

    def _check_padding(self, key: str) -> None:
        """ValueError where the config's vocabulary would cut off rows that are none of a layout's padding.

        This program pads with zeros; Megatron-LM, with any values, to a multiple of 128 x TP.
        """
        rows, real = self._checkpoint.shapes[key][0], self._geometry.vocab_size
        padding = rows - real
        if padding == 0 or (rows % 128 == 0 and padding < 128 * 64):
            return
        for start in range(real, rows, 1024):
            block = self._checkpoint.read_region(
                key, (start, 0), (min(1024, rows - start), self._checkpoint.shapes[key][1])
            )
            if block.any():
                raise ValueError(
                    f"{self.path}: {key} has {rows} rows, the config's vocab_size is {real}, "
                    "and the rows beyond it are no padding"
                )


def megatron_shape(place: Place, geometry: Geometry) -> tuple[int, ...]:
    """Return the full shape of a Megatron parameter: its HF tensors joined along axis 0."""
    shapes = place.hf_shapes(geometry)
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])
