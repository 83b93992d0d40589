"""What the planner assumes about each chip: the rates of its data sheet and the share of them that real runs reach.

Sources: NVIDIA data sheets of H100 SXM, H200 SXM and B200 (dense rates, no sparsity; HGX boards with NVLink and one
400 Gb/s network adapter per GPU). The reachable shares are read off published runs: bf16 training 343 TFLOP/s per H100
(torchtitan, 8B), FP8 744 TFLOP/s per H100 (Megatron-Bridge, 8B), a device copy on one H200 at 4.3 of 4.8 TB/s. The
`cpu` rates were measured on two x86 cores with one thread per process.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


def gib(nbytes: float) -> str:
    """Bytes for people."""
    return f"{nbytes / GIB:.1f} GiB"


@dataclass(frozen=True)
class Chip:
    """One device. Rates are per second, of this device alone; links are in one direction."""

    name: str
    memory_bytes: int
    bf16_flops: float
    fp8_flops: float  # 0: no FP8
    memory_bandwidth: float  # bytes
    node_bandwidth: float  # bytes, to another device of the node
    network_bandwidth: float  # bytes, to a device of another node
    host_bandwidth: float  # bytes, to host memory
    fp8_recipes: tuple[str, ...]
    reserve_bytes: int  # device context(s), communicator buffers, allocator's unused blocks
    train_share: float  # of bf16_flops that linear layers reach
    fp8_share: float  # of fp8_flops
    bandwidth_share: float  # of the three bandwidths


_HOPPER_FP8 = ("delayed", "tensorwise", "blockwise")

CHIPS = {
    "h100": Chip(
        "h100", 81559 << 20, 989e12, 1979e12, 3.35e12, 450e9, 50e9, 55e9,
        _HOPPER_FP8, 4 * GIB, 0.45, 0.38, 0.8,
    ),
    "h200": Chip(
        "h200", 143771 << 20, 989e12, 1979e12, 4.8e12, 450e9, 50e9, 55e9,
        _HOPPER_FP8, 4 * GIB, 0.45, 0.38, 0.8,
    ),
    "b200": Chip(
        "b200", 183359 << 20, 2250e12, 4500e12, 8e12, 900e9, 50e9, 55e9,
        (*_HOPPER_FP8, "mxfp8"), 4 * GIB, 0.45, 0.38, 0.8,
    ),
    # one process: a core, its share of memory, loopback
    "cpu": Chip("cpu", 8 * GIB, 54e9, 0, 8e9, 1e9, 1e9, 8e9, (), GIB // 2, 1.0, 0.0, 0.8),
}  # fmt: skip
