"""Checksums against hashlib and against values that SGLang's own code gave."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_nft.engines.shards import EngineReference, engine_name, shards
from megatron_nft.weights.buckets import Bucket, TensorMeta
from megatron_nft.weights.checksum import nft_checksum
from megatron_nft.weights.checksum.nft_checksum import Sha256, WordHash, checksum


def short_sha256(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()[:16]


def test_host_checksum_is_the_start_of_sha256():
    tensor = torch.arange(12, dtype=torch.float32).view(3, 4)
    assert checksum(tensor) == short_sha256(tensor)
    assert checksum(tensor.T) == short_sha256(tensor.T)  # by value order, not by memory order
    hashed = Sha256()
    hashed.update(tensor[:1]), hashed.update(tensor[1:])
    assert hashed.hexdigest() == short_sha256(tensor)


# tensor_hash(t) of SGLang 0.5.23 (kernels/ops/memory/gpu_tensor_hash.py), its Triton kernel run with TRITON_INTERPRET=1
GOLDEN = {
    (1, torch.float32): "6dd7189357060e7c",
    (5, torch.bfloat16): "de945f77207e7e70",
    (8193, torch.float32): "42c95b34fd004e53",
    (40001, torch.bfloat16): "360ce8ce684b931d",
}


@pytest.mark.parametrize(("count", "dtype"), GOLDEN)
def test_word_hash_is_sglangs_gpu_hash(count, dtype):
    tensor = (torch.arange(count, dtype=torch.float32) % 251 - 125).to(dtype)
    hashed = WordHash(tensor.nbytes)
    hashed.update(tensor)
    assert hashed.hexdigest() == GOLDEN[count, dtype]


KERNEL = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
import nft_checksum, nft_checksum_triton  # as in an engine, without our package
for count, dtype, parts in (
    (1, torch.float32, [1]),
    (40001, torch.bfloat16, [40001]),
    (30000, torch.float32, [7001, 1, 998, 8192, 13808]),  # parts that begin and end inside tiles
):
    tensor = (torch.arange(count, dtype=torch.float32) % 251 - 125).to(dtype)
    hashed = nft_checksum.WordHash(tensor.nbytes)
    hashed._tiles = torch.zeros(2, -(-hashed._words // 8192), dtype=torch.int64)
    for part in tensor.split(parts):
        data = part.view(torch.uint8)
        hashed._add_by(nft_checksum_triton, torch.nn.functional.pad(data, (0, -data.numel() % 4)).view(torch.int32))
    print(hashed.hexdigest())
"""
COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
sys.path.insert(0, sys.argv[1])
import nft_checksum_triton as m
from nft_checksum import MIX, WordHash as w
signature = {"words": "*i32", "tiles": "*i64", "number": "i32", "done": "i64", "first_tile": "i32", "num_tiles": "i32"}
names = "SEED_A SEED_B POSITION_A POSITION_B ROTATE_A ROTATE_B MIX_A MIX_B TILE BLOCK".split()
values = dict(zip(names, (*w.SEEDS, *w.POSITION, *w.ROTATE, *MIX, 8192, m.BLOCK), strict=True))
source = ASTSource(m._hash_tiles, signature | dict.fromkeys(names, "constexpr"), constexprs=values)
made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": m.NUM_WARPS})
assert made.asm["cubin"]
assert ".local" not in made.asm["ptx"]
"""


def in_triton(program: str, tmp_path, **variables: str) -> str:
    """Output of a program that gets the engine-side folder; Triton reads its variables when it is imported."""
    pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", program, str(Path(nft_checksum.__file__).parent)]
    done = subprocess.run(command, env=env | variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_kernel_gives_the_same_hashes(tmp_path):
    whole = (torch.arange(30_000, dtype=torch.float32) % 251 - 125).float()
    reference = WordHash(whole.nbytes)
    reference.update(whole)
    expected = [GOLDEN[1, torch.float32], GOLDEN[40001, torch.bfloat16], reference.hexdigest()]
    assert in_triton(KERNEL, tmp_path, TRITON_INTERPRET="1").split() == expected


def test_the_kernel_compiles_for_hopper(tmp_path):
    in_triton(COMPILE, tmp_path)


def test_word_hash_of_parts_is_that_of_the_whole():
    tensor = torch.arange(30_000, dtype=torch.float32)
    whole, parts = WordHash(tensor.nbytes), WordHash(tensor.nbytes)
    whole.update(tensor)
    for part in tensor.split(7_001):
        parts.update(part)
    assert parts.hexdigest() == whole.hexdigest()
    swapped = WordHash(tensor.nbytes)
    swapped.update(tensor.flip(0))
    assert swapped.hexdigest() != whole.hexdigest()


def bucket(tensors: dict[str, torch.Tensor]) -> Bucket:
    metas, offset = [], 0
    for name, t in tensors.items():
        metas.append(TensorMeta(name, tuple(t.shape), t.dtype, offset, offset + t.nbytes))
        offset += t.nbytes
    flat = torch.empty(offset, dtype=torch.uint8)
    made = Bucket(metas, flat)
    for (_, target), source in zip(made.tensors, tensors.values(), strict=True):
        target.copy_(source)
    return made


GEOMETRY = SimpleNamespace(num_attention_heads=4, num_query_groups=2, kv_channels=3, num_experts=2)


def layer(prefix="model.layers.0."):
    q, k, v = torch.randn(12, 8), torch.randn(6, 8), torch.randn(6, 8)
    return {f"{prefix}self_attn.{n}_proj.weight": t for n, t in zip("qkv", (q, k, v), strict=True)}, (q, k, v)


def test_engine_reference_of_fused_tensors():
    tensors, (q, k, v) = layer()
    gate, up, down, o = torch.randn(10, 8), torch.randn(10, 8), torch.randn(8, 10), torch.randn(8, 12)
    tensors |= {
        "model.layers.0.mlp.gate_proj.weight": gate,
        "model.layers.0.mlp.up_proj.weight": up,
        "model.layers.0.mlp.down_proj.weight": down,
        "model.layers.0.self_attn.o_proj.weight": o,
    }
    one, two = EngineReference(GEOMETRY, 1), EngineReference(GEOMETRY, 2)
    for reference in (one, two):
        reference.add(bucket(dict(list(tensors.items())[:2])))  # q and k come in one bucket, the rest in the next
        reference.add(bucket(dict(list(tensors.items())[2:])))
    assert one.result() == {
        "model.layers.0.self_attn.qkv_proj.weight": short_sha256(q, k, v),
        "model.layers.0.mlp.gate_up_proj.weight": short_sha256(gate, up),
        "model.layers.0.mlp.down_proj.weight": short_sha256(down),
        "model.layers.0.self_attn.o_proj.weight": short_sha256(o),
    }
    second = {key.removesuffix("@1"): value for key, value in two.result().items() if key.endswith("@1")}
    assert second == {
        "model.layers.0.self_attn.qkv_proj.weight": short_sha256(q[6:], k[3:], v[3:]),
        "model.layers.0.mlp.gate_up_proj.weight": short_sha256(gate[5:], up[5:]),
        "model.layers.0.mlp.down_proj.weight": short_sha256(down[:, 5:]),
        "model.layers.0.self_attn.o_proj.weight": short_sha256(o[:, 6:]),
    }


def test_key_value_heads_repeat_on_more_ranks_than_heads():
    k = torch.arange(6.0).view(6, 1)
    parts = list(shards("model.layers.0.self_attn.k_proj.weight", k, GEOMETRY, 4))
    assert [torch.cat(part).flatten().tolist() for part in parts] == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]


class _Allocations(TorchDispatchMode):
    """Most bytes of one tensor that an operation made, views of `known` left out."""

    def __init__(self, known: torch.Tensor) -> None:
        super().__init__()
        self._known, self.most = known.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() != self._known:
                self.most = max(self.most, tensor.nbytes)
        return made


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"])
def test_hashing_needs_no_second_copy_of_a_tensor(monkeypatch, name, tp):
    """A leader may hold two buckets and the largest tensor: no room for one more of that size."""
    monkeypatch.setattr("megatron_nft.engines.shards.BLOCK_BYTES", 1024)
    made = bucket({name: torch.randn(1000, 64)})
    with _Allocations(made.flat) as seen:
        EngineReference(GEOMETRY, tp).add(made)
    assert seen.most <= 63 * 64 * 4, "the rows that pad the vocabulary, or a block of rows"


def test_blocks_of_columns_hash_as_the_whole(monkeypatch):
    """Rows of 10 bytes in blocks of whole 32-bit words, for either hash."""
    monkeypatch.setattr("megatron_nft.engines.shards.BLOCK_BYTES", 30)
    name, weight = "model.layers.0.mlp.down_proj.weight", torch.randn(9, 10).bfloat16()
    assert len(next(shards(name, weight, GEOMETRY, 2))) == 5
    for expected in (short_sha256(weight[:, 5:].contiguous().view(torch.uint8)), word_hash(weight[:, 5:])):
        reference = EngineReference(GEOMETRY, 2)
        reference.add(bucket({name: weight}))
        assert reference.result()[f"{name}@1"] == expected
        monkeypatch.setattr("megatron_nft.engines.shards.hasher", lambda device, nbytes: WordHash(nbytes))


def word_hash(tensor: torch.Tensor) -> str:
    whole = WordHash(tensor.nbytes)
    whole.update(tensor)
    return whole.hexdigest()


def test_vocabulary_is_padded_to_64_with_zeros():
    embedding = torch.ones(70, 2)
    first, second = map(torch.cat, shards("model.embed_tokens.weight", embedding, GEOMETRY, 2))
    assert first.shape == second.shape == (64, 2)
    assert first.sum() == 128 and second.sum() == 12


def test_experts_make_one_tensor_per_layer():
    names = [f"model.layers.3.mlp.experts.{e}.{n}_proj.weight" for e in (0, 1) for n in ("gate", "up")]
    assert {engine_name(name) for name in names} == {"model.layers.3.mlp.experts.w13_weight"}
    assert engine_name("model.layers.3.mlp.experts.1.down_proj.weight") == "model.layers.3.mlp.experts.w2_weight"
    tensors = {name: torch.randn(6, 8) for name in names}
    reference = EngineReference(GEOMETRY, 1)
    reference.add(bucket(dict(list(tensors.items())[:3])))
    reference.add(bucket(dict(list(tensors.items())[3:])))
    assert reference.result() == {"model.layers.3.mlp.experts.w13_weight": short_sha256(*tensors.values())}


def test_fused_bytes_are_known_from_the_first_part(monkeypatch):
    """A word hash needs the size of the whole tensor before its parts: too few or too many words would raise."""
    monkeypatch.setattr("megatron_nft.engines.shards.hasher", lambda device, nbytes: WordHash(nbytes))
    tensors, (q, k, v) = layer()
    experts = {
        f"model.layers.0.mlp.experts.{e}.{n}_proj.weight": torch.randn(6, 8) for e in (0, 1) for n in ("gate", "up")
    }
    for tp in (1, 2, 4):
        reference = EngineReference(GEOMETRY, tp)
        reference.add(bucket(tensors | {name: t[: 6 // tp * tp] for name, t in experts.items()}))
        found = reference.result()
        if tp == 1:
            whole = WordHash(q.nbytes + k.nbytes + v.nbytes)
            whole.update(torch.cat([q, k, v]))
            assert found["model.layers.0.self_attn.qkv_proj.weight"] == whole.hexdigest()
