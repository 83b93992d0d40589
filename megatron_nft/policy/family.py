"""The model that a Hugging Face folder holds, read exactly from its config.json.

The families are those of policy/families. A value that this code would not honour (another activation, a sliding
window, an unknown RoPE scaling, quantized weights) is a ValueError that names the key, the value and what is allowed.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_nft.config import PolicyConfig
from megatron_nft.policy.families import FAMILIES
from megatron_nft.policy.families.record import ExpertKeys


class UnsupportedModelError(ValueError):
    """A model that may be sound, but that this code does not compute: another family, activation or RoPE scaling."""


LLAMA3_ROPE_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's `rope_type: llama3`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelSpec:
    """The sizes and switches of a model. Names are megatron-core's."""

    family: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int  # key/value heads
    kv_channels: int  # size of one head
    ffn_hidden_size: int  # of the dense MLP; a mixture of experts has none and uses moe_ffn_hidden_size
    vocab_size: int  # rows of the HF embedding, without our padding
    tied: bool  # the output layer is the embedding
    norm_epsilon: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    add_qkv_bias: bool
    qk_layernorm: bool
    num_experts: int = 0
    moe_ffn_hidden_size: int = 0
    num_experts_per_token: int = 0
    normalize_expert_weights: bool = True  # HF's norm_topk_prob

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
        raise type(error)(f"{path}: {error}") from error


def spec_from_config(config: dict[str, Any]) -> ModelSpec:
    """The ModelSpec of a parsed config.json, written by transformers 4 (`rope_theta`) or 5 (`rope_parameters`).

    UnsupportedModelError for an unknown family and for a value that the code would not honour, ValueError for a missing
    or wrong size and for places that contradict each other.
    """
    name = config.get("model_type")
    if name not in FAMILIES:
        raise UnsupportedModelError(f"model_type is {name!r}; allowed: {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[name]
    rope = _rope(config)
    try:
        family.refuse_unknown_values(config)
    except ValueError as error:
        raise UnsupportedModelError(str(error)) from None
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
        rope_theta=rope.theta,
        rope_scaling=rope.scaling(),
        max_position_embeddings=_positive(config, "max_position_embeddings"),
        add_qkv_bias=family.attention_bias,
        qk_layernorm=family.qk_norm,
        **({} if family.experts is None else _experts(config, family.experts)),
    )


def _experts(config: dict[str, Any], keys: ExpertKeys) -> dict[str, Any]:
    """The fields of ModelSpec that a mixture of experts adds."""
    counts = keys.num_experts
    return {
        "num_experts": _positive(config, next((key for key in counts if key in config), counts[0])),
        "moe_ffn_hidden_size": _positive(config, keys.ffn_hidden_size),
        "num_experts_per_token": _positive(config, keys.experts_per_token),
        "normalize_expert_weights": bool(config.get(keys.normalize_weights, False)),
    }


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


def split_problems(spec: ModelSpec, policy: PolicyConfig) -> list[str]:
    """Why the model cannot be split over the ranks as set, one sentence per rule that is broken. The vocabulary is
    padded, so it never stands in the way."""
    tp, pp, ep = (
        policy.tensor_model_parallel_size,
        policy.pipeline_model_parallel_size,
        policy.expert_model_parallel_size,
    )
    vpp = policy.virtual_pipeline_model_parallel_size or 1
    divided, problems = tensor_parallel_sizes(spec), []
    for key, value in divided.items():
        if value % tp:
            common = math.gcd(*divided.values())
            allowed = [n for n in range(1, common + 1) if common % n == 0]
            problems.append(
                f"tensor_model_parallel_size ({tp}) must divide the model's {key} ({value}); "
                f"allowed for this model: {', '.join(map(str, allowed))}"
            )
    if spec.num_layers % (pp * vpp):
        chunks = f"pipeline_model_parallel_size ({pp})"
        chunks += f" x virtual_pipeline_model_parallel_size ({vpp}) = {pp * vpp}" if vpp > 1 else ""
        problems.append(f"{chunks} must divide the model's num_hidden_layers ({spec.num_layers})")
    if ep > 1 and not spec.num_experts:
        problems.append(f"expert_model_parallel_size ({ep}) must be 1: {spec.family} has no experts")
    elif spec.num_experts % ep:
        problems.append(f"expert_model_parallel_size ({ep}) must divide the model's num_experts ({spec.num_experts})")
    return problems


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


@dataclass(frozen=True)
class _Rope:
    """RoPE as one place of config.json has it."""

    key: str  # rope_parameters | rope_scaling
    theta: float
    kind: str
    values: dict[str, Any]

    def scaling(self) -> RopeScaling | None:
        """Read the scaling; UnsupportedModelError for a kind that the code does not compute."""
        if self.kind == "default":
            return None
        if self.kind != "llama3":
            raise UnsupportedModelError(f"{self.key}.rope_type is {self.kind!r}; allowed: 'default', 'llama3'")
        values = self.values
        missing = [name for name in LLAMA3_ROPE_KEYS if not isinstance(values.get(name), int | float)]
        if missing:
            raise ValueError(f"{self.key} of rope_type llama3 lacks the number(s) {', '.join(missing)}")
        if not values["high_freq_factor"] > values["low_freq_factor"]:
            raise ValueError(
                f"{self.key}.high_freq_factor ({values['high_freq_factor']}) must exceed "
                f"low_freq_factor ({values['low_freq_factor']})"
            )
        return RopeScaling(*(values[name] for name in LLAMA3_ROPE_KEYS))


def _rope(config: dict[str, Any]) -> _Rope:
    """RoPE from `rope_parameters`, from `rope_theta` and `rope_scaling`, or from both where they agree.

    ValueError, naming the places, where they do not: libraries differ in which of them they believe.
    """
    found = [_rope_at(config, key) for key in ("rope_parameters", "rope_scaling") if config.get(key)]
    if not found:
        return _rope_at(config, "rope_scaling")
    first, *others = found
    for other in others:
        if (first.theta, first.kind, first.values) != (other.theta, other.kind, other.values):
            raise ValueError(
                f"rope_parameters is {config['rope_parameters']!r} and rope_scaling is {config['rope_scaling']!r}: "
                "they contradict each other; keep the one that the model was trained with"
            )
    return first


def _rope_at(config: dict[str, Any], key: str) -> _Rope:
    """RoPE as `key` has it, with the theta beside it where it has none of its own."""
    rope = config.get(key) or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{key} is {rope!r}; it must be an object or null")
    beside = config.get("rope_theta")
    theta = rope.get("rope_theta", 10000.0 if beside is None else beside)
    if not isinstance(theta, int | float) or theta <= 0:
        raise ValueError(f"rope_theta is {theta!r}; it must be a positive number")
    if beside is not None and beside != theta:
        raise ValueError(f"rope_theta is {beside!r} and {key}.rope_theta is {theta!r}; keep the one that is right")
    kinds = [rope[name] for name in ("rope_type", "type") if name in rope] or ["default"]
    if len(set(kinds)) > 1:
        raise ValueError(f"{key}.rope_type is {kinds[0]!r} and {key}.type is {kinds[1]!r}; keep the one that is right")
    own = {"rope_theta", "rope_type", "type"} if kinds[0] != "default" else rope.keys()  # default reads theta alone
    return _Rope(key, float(theta), kinds[0], {name: value for name, value in rope.items() if name not in own})
