"""How SGLang and vLLM keep the weights: fused tensors, split over tensor-parallel ranks, vocabulary padded.

The trainer hashes its HF tensors in that form while they stream by, to compare with what the servers say of theirs.

    qkv_proj      [q rows | k rows | v rows] of the rank's heads; with more ranks than key/value heads, heads repeat
    gate_up_proj  [gate rows | up rows] of the rank
    w13_weight    per expert [gate | up], all experts of a layer; w2_weight: their down projections
    embed_tokens, lm_head   rows padded with zeros to a multiple of 64
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator

import torch

from megatron_nft.weights.buckets import Bucket
from megatron_nft.weights.checksum.nft_checksum import Sha256, WordHash, hasher
from megatron_nft.weights.names import Geometry
from megatron_nft.weights.transport import rank_key

NewHash = Callable[[torch.device, int], Sha256 | WordHash]
"""(device of the tensors, their bytes) -> an empty hash"""
VOCAB_MULTIPLE = 64
BLOCK_BYTES = 4 << 20
"""Columns are hashed in blocks of rows of about this size, since hashing copies what is not contiguous."""
_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
_FUSED["up_proj"] = "gate_up_proj"
_EXPERT = re.compile(r"\.experts\.\d+\.(gate|up|down)_proj\.weight$")
_FUSED_PART = re.compile(r"\.(" + "|".join(_FUSED) + r")\.")


def engine_name(hf_name: str) -> str:
    """Return the name of the engine's tensor that holds this HF tensor."""
    if expert := _EXPERT.search(hf_name):
        return hf_name[: expert.start()] + (".experts.w2_weight" if expert[1] == "down" else ".experts.w13_weight")
    return _FUSED_PART.sub(lambda part: f".{_FUSED[part[1]]}.", hf_name)


def shards(hf_name: str, tensor: torch.Tensor, geometry: Geometry, tp_size: int) -> Iterator[list[torch.Tensor]]:
    """Yield for each of the engine's `tp_size` ranks, in order, the parts that it holds of one full HF tensor.

    Joined, they are the rank's bytes. All but the rows that pad the vocabulary are views.
    """
    for rank in range(tp_size):
        yield _shard(hf_name, tensor, geometry, rank, tp_size)


def _shard(name: str, tensor: torch.Tensor, geometry: Geometry, rank: int, size: int) -> list[torch.Tensor]:
    if re.search(r"(embed_tokens|lm_head)\.weight$", name):
        rows = padded_vocab(tensor.shape[0]) // size
        own = tensor[rank * rows : (rank + 1) * rows]
        return [own, tensor.new_zeros(rows - own.shape[0], *tensor.shape[1:])]
    if re.search(r"\.(k_proj|v_proj)\.", name):
        heads = tensor.view(geometry.num_query_groups, geometry.kv_channels, *tensor.shape[1:])
        per_rank = max(1, geometry.num_query_groups // size)
        first = rank * geometry.num_query_groups // size
        return [heads[first : first + per_rank].flatten(0, 1)]
    if re.search(r"\.(q_proj|gate_proj|up_proj)\.", name):
        return [tensor.chunk(size)[rank]]
    if size > 1 and re.search(r"\.(o_proj|down_proj)\.", name):
        columns = tensor.chunk(size, dim=1)[rank]
        rows = 2 * max(1, BLOCK_BYTES // (2 * columns[0].nbytes))  # even: whole 32-bit words
        return list(torch.split(columns, rows))
    return [tensor]


def padded_vocab(rows: int) -> int:
    """Return the rows of the embedding for a vocabulary of `rows`: the next multiple of `VOCAB_MULTIPLE`."""
    return math.ceil(rows / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class EngineReference:
    """Checksums of the engine's tensors, from the trainer's: fed with every bucket of a stage, in order.

    Keys are `transport.rank_key`s.
    """

    def __init__(
        self, geometry: Geometry, tp_size: int, new_hash: NewHash | None = None, *, experts: bool = True
    ) -> None:
        """new_hash: of the engine, `nft_checksum.hasher` by default. experts: whether theirs are taken too."""
        self._geometry, self._tp_size = geometry, tp_size
        self._new_hash, self._experts = new_hash or hasher, experts
        self._hashes: dict[str, Sha256 | WordHash] = {}

    def add(self, bucket: Bucket) -> None:
        for name, tensor in bucket.tensors:
            if not self._experts and _EXPERT.search(name):
                continue
            for rank, parts in enumerate(shards(name, tensor, self._geometry, self._tp_size)):
                key = rank_key(engine_name(name), rank, self._tp_size)
                if key not in self._hashes:
                    nbytes = self._fused_bytes(name, sum(part.nbytes for part in parts))
                    self._hashes[key] = self._new_hash(tensor.device, nbytes)
                for part in parts:
                    self._hashes[key].update(part)

    def _fused_bytes(self, name: str, nbytes: int) -> int:
        """Bytes of the engine's whole tensor, from those of its first HF tensor."""
        if ".q_proj." in name:
            g = self._geometry
            key_value_heads = max(1, g.num_query_groups // self._tp_size)
            query_heads = g.num_attention_heads // self._tp_size
            return nbytes * (query_heads + 2 * key_value_heads) // query_heads
        parts = 2 if ".gate_proj." in name else 1
        return nbytes * parts * (self._geometry.num_experts if ".experts." in name else 1)

    def result(self) -> dict[str, str]:
        return {key: hashed.hexdigest() for key, hashed in self._hashes.items()}
