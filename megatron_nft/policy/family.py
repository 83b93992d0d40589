"""The model that a Hugging Face folder holds, read exactly from its config.json.

The families are those of policy/families. A value that this code would not honour (another activation, a sliding
window, an unknown RoPE scaling, quantized weights) is a ValueError that names the key, the value and what is allowed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_nft.config import PolicyConfig
from megatron_nft.policy.families import FAMILIES
from megatron_nft.policy.families.record import ExpertKeys

LLAMA3_ROPE_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


_EXPERTS = ("num_experts", "moe_ffn_hidden_size", "num_experts_per_token", "normalize_expert_weights")
_FLAT = ("rope_theta", "add_qkv_bias", "qk_layernorm", *_EXPERTS)
"""Properties that stand beside the fields in the flat form."""


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's `rope_type: llama3`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the dense MLP."""

    count: int
    ffn_hidden_size: int  # of one expert
    per_token: int
    normalize_weights: bool  # HF's norm_topk_prob


@dataclass(frozen=True)
class ModelSpec:
    """The sizes and switches of a model. Names are megatron-core's."""

    family: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int  # key/value heads
    kv_channels: int  # size of one head
    ffn_hidden_size: int  # of the dense MLP; a mixture of experts has none
    vocab_size: int  # rows of the HF embedding, without our padding
    tied: bool  # the output layer is the embedding
    norm_epsilon: float
    rope: tuple[float, RopeScaling | None]  # theta, scaling
    max_position_embeddings: int
    experts: Experts | None = None

    @property
    def rope_theta(self) -> float:
        return self.rope[0]

    @property
    def rope_scaling(self) -> RopeScaling | None:
        return self.rope[1]

    @property
    def add_qkv_bias(self) -> bool:
        return FAMILIES[self.family].attention_bias

    @property
    def qk_layernorm(self) -> bool:
        return FAMILIES[self.family].qk_norm

    @property
    def num_experts(self) -> int:
        """0 for a dense model."""
        return self.experts.count if self.experts else 0

    @property
    def moe_ffn_hidden_size(self) -> int:
        """MLP width of one expert; 0 for a dense model."""
        return self.experts.ffn_hidden_size if self.experts else 0

    @property
    def num_experts_per_token(self) -> int:
        """0 for a dense model."""
        return self.experts.per_token if self.experts else 0

    @property
    def normalize_expert_weights(self) -> bool:
        return self.experts.normalize_weights if self.experts else True

    def to_dict(self) -> dict[str, Any]:
        """One flat level, as manifests of checkpoints and `plan --json` hold it; `from_dict` reads it."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("rope", "experts")}
        scaling = self.rope_scaling and asdict(self.rope_scaling)
        return own | {"rope_scaling": scaling} | {name: getattr(self, name) for name in _FLAT}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelSpec:
        """The spec that `to_dict` gave, of any version. KeyError or TypeError for anything else."""
        own = {f.name: values[f.name] for f in fields(cls) if f.name not in ("rope", "experts")}
        scaling = values["rope_scaling"] and RopeScaling(**values["rope_scaling"])
        experts = Experts(*(values[name] for name in _EXPERTS)) if values["num_experts"] else None
        return cls(**own, rope=(values["rope_theta"], scaling), experts=experts)

    def padded_vocab_size(self, tensor_model_parallel_size: int) -> int:
        """Number of rows of Megatron's embedding: the next multiple of the TP size."""
        return -(-self.vocab_size // tensor_model_parallel_size) * tensor_model_parallel_size

    def padding_note(self, tensor_model_parallel_size: int) -> str | None:
        """A note for the user where the TP size does not divide the vocabulary; None where it does."""
        padded = self.padded_vocab_size(tensor_model_parallel_size)
        if padded == self.vocab_size:
            return None
        return (
            f"vocabulary: tensor_model_parallel_size ({tensor_model_parallel_size}) does not divide the model's "
            f"vocab_size ({self.vocab_size}); padded to {padded} rows, of which the last {padded - self.vocab_size} "
            "never get probability and are not exported"
        )


def read_family(model_path: Path | str) -> ModelSpec:
    """Read `model_path`/config.json. Raises FileNotFoundError or ValueError, each saying what to do."""
    path = Path(model_path) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; model.path must be a folder in Hugging Face format")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    try:
        return spec_from_config(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def spec_from_config(config: dict[str, Any]) -> ModelSpec:
    """The ModelSpec of a parsed config.json, written by transformers 4 (`rope_theta`) or 5 (`rope_parameters`).

    ValueError for an unknown family, a missing or wrong size, and a value that the code would not honour.
    """
    name = config.get("model_type")
    if name not in FAMILIES:
        raise ValueError(f"model_type is {name!r}; allowed: {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[name]
    family.refuse_unknown_values(config)
    heads, hidden = _positive(config, "num_attention_heads"), _positive(config, "hidden_size")
    if config.get("head_dim") is None and hidden % heads:
        raise ValueError(f"num_attention_heads ({heads}) must divide hidden_size ({hidden}) where head_dim is absent")
    return ModelSpec(
        family=family.name,
        num_layers=_positive(config, "num_hidden_layers"),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=_positive(config, "num_key_value_heads", default=heads),
        kv_channels=_positive(config, "head_dim", default=hidden // heads),
        ffn_hidden_size=_positive(config, "intermediate_size"),
        vocab_size=_positive(config, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
        rope=_rope(config),
        max_position_embeddings=_positive(config, "max_position_embeddings"),
        experts=None if family.experts is None else _experts(config, family.experts),
    )


def _experts(config: dict[str, Any], keys: ExpertKeys) -> Experts:
    counts = keys.num_experts
    return Experts(
        count=_positive(config, next((key for key in counts if key in config), counts[0])),
        ffn_hidden_size=_positive(config, keys.ffn_hidden_size),
        per_token=_positive(config, keys.experts_per_token),
        normalize_weights=bool(config.get(keys.normalize_weights, False)),
    )


def tensor_parallel_sizes(spec: ModelSpec) -> dict[str, int]:
    """The sizes that the tensor-parallel size must divide, by their names in config.json."""
    experts = spec.num_experts > 0
    return {
        "num_attention_heads": spec.num_attention_heads,
        "num_key_value_heads": spec.num_query_groups,
        "moe_intermediate_size" if experts else "intermediate_size": (
            spec.moe_ffn_hidden_size if experts else spec.ffn_hidden_size
        ),
    }


@dataclass(frozen=True)
class SizeNames:
    """How messages name the parallel sizes; `{}` stands for the number."""

    tp: str
    pp: str
    vpp: str
    ep: str
    brief: bool  # without the product of pp and vpp and without the sizes that would do


SETTINGS = SizeNames(
    tp="tensor_model_parallel_size ({})",
    pp="pipeline_model_parallel_size ({})",
    vpp="virtual_pipeline_model_parallel_size ({})",
    ep="expert_model_parallel_size ({})",
    brief=False,
)
OPTIONS = SizeNames(tp="--tp {}", pp="--pp {}", vpp="--vpp {}", ep="--ep {}", brief=True)


def division_problems(spec: ModelSpec, *, tp: int, pp: int, vpp: int, ep: int, names: SizeNames) -> list[str]:
    """Why the model cannot be divided by these sizes, one sentence per rule that is broken.

    The vocabulary is padded, so it never stands in the way.
    """
    divided, problems = tensor_parallel_sizes(spec), []
    for key, value in divided.items():
        if value % tp:
            common = math.gcd(*divided.values())
            allowed = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            hint = "" if names.brief else f"; allowed for this model: {allowed}"
            problems.append(f"{names.tp.format(tp)} must divide the model's {key} ({value}){hint}")
    if spec.num_layers % (pp * vpp):
        chunks = names.pp.format(pp)
        chunks += f" x {names.vpp.format(vpp)}" if vpp > 1 or names.brief else ""
        chunks += f" = {pp * vpp}" if vpp > 1 and not names.brief else ""
        problems.append(f"{chunks} must divide the model's num_hidden_layers ({spec.num_layers})")
    if ep > 1 and not spec.num_experts:
        problems.append(f"{names.ep.format(ep)} must be 1: {spec.family} has no experts")
    elif spec.num_experts % ep:
        problems.append(f"{names.ep.format(ep)} must divide the model's num_experts ({spec.num_experts})")
    return problems


def split_problems(spec: ModelSpec, policy: PolicyConfig) -> list[str]:
    """Return the `division_problems` of the sizes in the settings."""
    return division_problems(
        spec,
        tp=policy.tensor_model_parallel_size,
        pp=policy.pipeline_model_parallel_size,
        vpp=policy.virtual_pipeline_model_parallel_size or 1,
        ep=policy.expert_model_parallel_size,
        names=SETTINGS,
    )


def check_layout(spec: ModelSpec, policy: PolicyConfig) -> None:
    """ValueError, with the first of `split_problems`, where the model cannot be split as set."""
    for problem in split_problems(spec, policy):
        raise ValueError(problem)


def _positive(config: dict[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key} is {value!r}; it must be a positive whole number")
    return value


def _rope(config: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from `rope_parameters`, or from `rope_theta` and `rope_scaling`."""
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(key) or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{key} is {rope!r}; it must be an object or null")
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    if not isinstance(theta, int | float) or theta <= 0:
        raise ValueError(f"rope_theta is {theta!r}; it must be a positive number")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise ValueError(f"{key}.rope_type is {kind!r}; allowed: 'default', 'llama3'")
    missing = [name for name in LLAMA3_ROPE_KEYS if not isinstance(rope.get(name), int | float)]
    if missing:
        raise ValueError(f"{key} of rope_type llama3 lacks the number(s) {', '.join(missing)}")
    if not rope["high_freq_factor"] > rope["low_freq_factor"]:
        raise ValueError(
            f"{key}.high_freq_factor ({rope['high_freq_factor']}) must exceed "
            f"low_freq_factor ({rope['low_freq_factor']})"
        )
    return float(theta), RopeScaling(*(rope[name] for name in LLAMA3_ROPE_KEYS))
