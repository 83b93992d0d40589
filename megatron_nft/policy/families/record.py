"""The record of a model family: all that distinguishes it from the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_nft.policy.families.parameters import EMBEDDING, FINAL_NORM, OUTPUT, TIED_OUTPUT, ParameterRow

CONFIG_VALUES: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0.0, None),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
    "use_sliding_window": (False,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
}
"""Key of config.json -> the values that the model code honours; any other value is refused. An absent key has
transformers' default, which is among them."""


@dataclass(frozen=True)
class ExpertKeys:
    """The keys of config.json that describe a mixture of experts."""

    num_experts: tuple[str, ...]  # the first one that is present is read
    ffn_hidden_size: str  # MLP width of one expert
    experts_per_token: str
    normalize_weights: str  # true: the weights of a token's experts sum to 1


@dataclass(frozen=True, eq=False)
class Family:
    """Everything that the code knows of one family; megatron_nft/policy/families/__init__.py lists them.

    All families share pre-norm layers with RMSNorm, rotary position embeddings, grouped-query attention and SwiGLU.
    """

    name: str  # `model_type` in config.json
    attention_bias: bool  # queries, keys and values have a bias; the projection has none
    qk_norm: bool  # queries and keys are normalized per head (RMSNorm)
    layer: tuple[ParameterRow, ...]  # the parameters of one layer, in the order of a forward pass
    experts: ExpertKeys | None = None  # None: every layer has one dense MLP
    config_values: Mapping[str, tuple[Any, ...]] | None = None  # None: CONFIG_VALUES

    def rows(self, tied: bool) -> tuple[ParameterRow, ...]:
        """The parameters of the whole model in the order of a forward pass; `tied`: the output layer is the
        embedding."""
        return (EMBEDDING, *self.layer, FINAL_NORM, TIED_OUTPUT if tied else OUTPUT)

    def refuse_unknown_values(self, config: Mapping[str, Any]) -> None:
        """ValueError for a value in a parsed config.json that the model code would not honour. The message names the
        key, the value and what is allowed."""
        for key, allowed in (CONFIG_VALUES if self.config_values is None else self.config_values).items():
            if key in config and config[key] not in allowed:
                values = " or ".join(map(repr, allowed))
                raise ValueError(f"{key} is {config[key]!r}; allowed: {values}")
        bias = config.get("attention_bias")
        if bias is not None and bias != self.attention_bias:
            raise ValueError(f"attention_bias is {bias!r}; allowed for {self.name}: {self.attention_bias}")
        kinds = set(config.get("layer_types") or ()) - {"full_attention"}
        if kinds:
            raise ValueError(f"layer_types holds {', '.join(sorted(kinds))}; allowed: full_attention in every layer")
