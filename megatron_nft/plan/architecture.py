"""Parameter counts of a model, whole and per rank, from the figures of its config.json.

Legend: h hidden, q = heads x head size, kv = key/value heads x head size, f MLP width, E experts, V vocabulary.

    linears of a layer   h (2 q + 2 kv) + 3 h f        QKV, projection, gate, up, down; with experts the MLP is
                         h E + 3 h f E                 the router and all experts
    beside them          QKV bias q + 2 kv (Qwen2), norms 2 h, norms of Q and K 2 head sizes (Qwen3)
    embedding, output    V h each, V padded to a multiple of TP; one of them where they are tied
"""

from __future__ import annotations

from pathlib import Path

from megatron_nft.config import ConfigError, ModelConfig
from megatron_nft.policy.family import ModelSpec, read_family, spec_from_config


def read_architecture(model: ModelConfig) -> ModelSpec:
    """From `model.architecture`, else from the folder `model.path`. ConfigError if none serves or both differ."""
    try:
        written = spec_from_config(model.architecture) if model.architecture else None
    except ValueError as e:
        raise ConfigError(f"model.architecture: {e}") from None
    if not (Path(model.path) / "config.json").is_file():
        if written is None:
            raise ConfigError(
                f"model.path {model.path}: no config.json there; give the folder of the model, "
                "or the figures of its config.json as model.architecture"
            )
        return written
    try:
        found = read_family(model.path)
    except (OSError, ValueError) as e:
        raise ConfigError(str(e)) from None
    if written is not None and written != found:
        names = [n for n in vars(found) if getattr(found, n) != getattr(written, n)]
        pairs = ", ".join(f"{n} {getattr(written, n)} (settings) and {getattr(found, n)} (folder)" for n in names)
        raise ConfigError(f"model.architecture does not describe the model in {model.path}: {pairs}")
    return found


def q_size(a: ModelSpec) -> int:
    """Size of all query heads."""
    return a.num_attention_heads * a.kv_channels


def kv_size(a: ModelSpec) -> int:
    """Size of all key (or value) heads."""
    return a.num_query_groups * a.kv_channels


def mlp_width(a: ModelSpec) -> int:
    """MLP width that one token goes through: of its experts together."""
    return a.moe_ffn_hidden_size * a.num_experts_per_token if a.num_experts else a.ffn_hidden_size


def attention_matrices(a: ModelSpec) -> int:
    """Weights of QKV and projection of one layer."""
    return a.hidden_size * (2 * q_size(a) + 2 * kv_size(a))


def expert_params(a: ModelSpec) -> int:
    """Weights of all experts of one layer; 0 for a dense model."""
    return 3 * a.hidden_size * a.moe_ffn_hidden_size * a.num_experts


def embedding_params(a: ModelSpec) -> int:
    return a.vocab_size * a.hidden_size


def _layer_params(a: ModelSpec, tp: int) -> int:
    """One layer on one of `tp` ranks, experts left out; norms and the router are on every rank."""
    bias = q_size(a) + 2 * kv_size(a) if a.add_qkv_bias else 0
    copies = 2 * a.hidden_size + (2 * a.kv_channels if a.qk_layernorm else 0) + a.hidden_size * a.num_experts
    mlp = 0 if a.num_experts else 3 * a.hidden_size * a.ffn_hidden_size
    return (attention_matrices(a) + mlp + bias) // tp + copies


def total_params(a: ModelSpec) -> int:
    """All parameters, as the HF folder holds them (tied embeddings once)."""
    layers = a.num_layers * (_layer_params(a, tp=1) + expert_params(a))
    return layers + embedding_params(a) * (1 if a.tied else 2) + a.hidden_size


def layer_matrices(a: ModelSpec) -> int:
    """Linear weights of all layers, all experts."""
    mlp = expert_params(a) or 3 * a.hidden_size * a.ffn_hidden_size
    return a.num_layers * (attention_matrices(a) + mlp)


def active_params(a: ModelSpec) -> int:
    """Weights that one token is multiplied with: the layers' and the output layer's."""
    layer = attention_matrices(a) + 3 * a.hidden_size * mlp_width(a) + a.hidden_size * a.num_experts
    return a.num_layers * layer + embedding_params(a)


def kv_bytes_per_token(a: ModelSpec) -> int:
    """KV cache of one token in 16 bits, all layers."""
    return 2 * a.num_layers * kv_size(a) * 2


def dense_params(a: ModelSpec, tp: int, pp: int, stage: int) -> int:
    """Parameters of pipeline `stage` on one TP rank, experts left out.

    With tied embeddings and PP > 1 the last stage keeps a copy of its own.
    """
    embedding = a.padded_vocab_size(tp) * a.hidden_size // tp
    params = a.num_layers // pp * _layer_params(a, tp)
    if stage == 0:
        params += embedding
    if stage == pp - 1:
        params += a.hidden_size + (0 if a.tied and pp == 1 else embedding)
    return params


def local_expert_params(a: ModelSpec, tp: int, pp: int, ep: int) -> int:
    """Expert weights on one rank: split over EP ranks, or over TP ranks where EP is 1."""
    return a.num_layers // pp * expert_params(a) // (ep if ep > 1 else tp)


def local_layer_matrices(a: ModelSpec, tp: int, pp: int, ep: int) -> int:
    """Linear weights of the layers on one rank: those that FP8 quantizes."""
    dense = 0 if a.num_experts else 3 * a.hidden_size * a.ffn_hidden_size
    return a.num_layers // pp * (attention_matrices(a) + dense) // tp + local_expert_params(a, tp, pp, ep)
