"""Parameter counts of a model, whole and per rank, from the sizes in its config.json.

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
    """Read the model from the folder `model.path`, or from `model.architecture` where the folder is not at hand.

    ConfigError if neither gives a model, or both do and differ.
    """
    try:
        written = spec_from_config(model.architecture) if model.architecture else None
    except ValueError as e:
        raise ConfigError(f"model.architecture: {e}") from None
    if not (Path(model.path) / "config.json").is_file():
        if written is None:
            raise ConfigError(
                f"model.path {model.path}: no config.json there; give the folder of the model, "
                "or the values of its config.json as model.architecture"
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


def q_size(spec: ModelSpec) -> int:
    """Size of all query heads."""
    return spec.num_attention_heads * spec.kv_channels


def kv_size(spec: ModelSpec) -> int:
    """Size of all key (or value) heads."""
    return spec.num_query_groups * spec.kv_channels


def mlp_width(spec: ModelSpec) -> int:
    """MLP width that one token goes through, summed over its experts."""
    return spec.moe_ffn_hidden_size * spec.num_experts_per_token if spec.num_experts else spec.ffn_hidden_size


def attention_matrices(spec: ModelSpec) -> int:
    """Weights of QKV and projection of one layer."""
    return spec.hidden_size * (2 * q_size(spec) + 2 * kv_size(spec))


def expert_params(spec: ModelSpec) -> int:
    """Weights of all experts of one layer; 0 for a dense model."""
    return 3 * spec.hidden_size * spec.moe_ffn_hidden_size * spec.num_experts


def embedding_params(spec: ModelSpec) -> int:
    """Weights of the embedding, without padding."""
    return spec.vocab_size * spec.hidden_size


def _layer_params(spec: ModelSpec, tp: int) -> int:
    """One layer on one of `tp` ranks, experts left out; norms and the router are on every rank."""
    bias = q_size(spec) + 2 * kv_size(spec) if spec.add_qkv_bias else 0
    copies = (
        2 * spec.hidden_size + (2 * spec.kv_channels if spec.qk_layernorm else 0) + spec.hidden_size * spec.num_experts
    )
    mlp = 0 if spec.num_experts else 3 * spec.hidden_size * spec.ffn_hidden_size
    return (attention_matrices(spec) + mlp + bias) // tp + copies


def total_params(spec: ModelSpec) -> int:
    """All parameters, as the HF folder holds them (tied embeddings once)."""
    layers = spec.num_layers * (_layer_params(spec, tp=1) + expert_params(spec))
    return layers + embedding_params(spec) * (1 if spec.tied else 2) + spec.hidden_size


def layer_matrices(spec: ModelSpec) -> int:
    """Linear weights of all layers, all experts."""
    mlp = expert_params(spec) or 3 * spec.hidden_size * spec.ffn_hidden_size
    return spec.num_layers * (attention_matrices(spec) + mlp)


def active_params(spec: ModelSpec) -> int:
    """Weights that one token is multiplied with: the layers' and the output layer's."""
    layer = attention_matrices(spec) + 3 * spec.hidden_size * mlp_width(spec) + spec.hidden_size * spec.num_experts
    return spec.num_layers * layer + embedding_params(spec)


def kv_bytes_per_token(spec: ModelSpec) -> int:
    """KV cache of one token in 16 bits, all layers."""
    return 2 * spec.num_layers * kv_size(spec) * 2


def dense_params(spec: ModelSpec, tp: int, pp: int, stage: int) -> int:
    """Parameters of pipeline `stage` on one TP rank, experts left out.

    With tied embeddings and PP > 1 the last stage keeps a copy of its own.
    """
    embedding = spec.padded_vocab_size(tp) * spec.hidden_size // tp
    params = spec.num_layers // pp * _layer_params(spec, tp)
    if stage == 0:
        params += embedding
    if stage == pp - 1:
        params += spec.hidden_size + (0 if spec.tied and pp == 1 else embedding)
    return params


def local_expert_params(spec: ModelSpec, tp: int, pp: int, ep: int) -> int:
    """Expert weights on one rank: split over EP ranks, or over TP ranks where EP is 1."""
    return spec.num_layers // pp * expert_params(spec) // (ep if ep > 1 else tp)


def local_layer_matrices(spec: ModelSpec, tp: int, pp: int, ep: int) -> int:
    """Linear weights of the layers on one rank, which are those that FP8 quantizes."""
    dense = 0 if spec.num_experts else 3 * spec.hidden_size * spec.ffn_hidden_size
    return spec.num_layers // pp * (attention_matrices(spec) + dense) // tp + local_expert_params(spec, tp, pp, ep)
