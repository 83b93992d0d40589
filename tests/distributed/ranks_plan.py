"""The planner's count of weights, gradients, optimizer shards and activations against what four ranks hold."""

import sys
from pathlib import Path

import torch
from launch import Ranks, run_checks

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

import test_plan_memory as counts
import torch.distributed as dist

from megatron_nft.plan import memory
from megatron_nft.plan.activations import cpu_ends, cpu_layer
from megatron_nft.plan.hardware import CHIPS
from megatron_nft.plan.layout import Cluster, LayoutSettings
from megatron_nft.policy.checkpoint import Saver

CLUSTER = Cluster(CHIPS["cpu"], 2, 2)


def close(found: float, planned: float, what: str) -> None:
    assert abs(found - planned) <= 0.05 * planned, f"{what}: {found} bytes, planned {planned}"


def compare(ranks: Ranks, family: str, tied: bool, **layout: object) -> None:
    if ranks.rank == 0:
        counts.tiny.make_model(ranks.scratch / family, family, tied=tied, **(counts.SIZES | {"layers": 4}))
    dist.barrier()
    config, policy = counts.open_policy(ranks.scratch / family, **layout)
    plan, stage = LayoutSettings.of(config), policy.layout.pp.rank
    parts = memory.trainer_memory(policy.spec, config, plan, CLUSTER, 1)[stage].phases["train"]
    where = f"{family} {layout} rank {ranks.rank}"
    close(sum(p.nbytes for p in policy.chunks[0].parameters()), parts["weights"], f"{where} weights")
    close(sum(b.grad_data.nbytes for d in policy.wrapped for b in d.buffers), parts["gradients"], f"{where} gradients")
    assert not policy.train_step([counts.batch(8)] * 2, counts.plain_loss, 100.0).skipped
    close(sum(t.nbytes for t in counts.optimizer_tensors(policy)), parts["optimizer"], f"{where} optimizer")
    copies = Saver(policy, copies=True).snapshot().pieces
    planned = memory.checkpoint_copy_bytes(policy.spec, config, plan, CLUSTER, stage)
    close(sum(piece.values.nbytes for piece in copies), planned, f"{where} checkpoint copies")
    if plan.pp == 1:
        e = memory.element_bytes(config)
        planned = policy.spec.num_layers * cpu_layer(policy.spec, plan, e).kept["none"] + cpu_ends(
            policy.spec, plan, e, 0
        )
        close(counts.kept_bytes(policy), planned * sum(counts.LENGTHS) / plan.cp, f"{where} activations")


def check_tensor_and_data_parallel(ranks: Ranks) -> None:
    compare(ranks, "qwen2", False, precision="bf16", tensor_model_parallel_size=2)


def check_sequence_parallel(ranks: Ranks) -> None:
    compare(ranks, "qwen3", False, precision="fp32", tensor_model_parallel_size=2, sequence_parallel=True)


def check_context_parallel(ranks: Ranks) -> None:
    compare(ranks, "qwen2", False, precision="fp32", context_parallel_size=2)
    compare(ranks, "qwen3", False, precision="bf16", tensor_model_parallel_size=2, context_parallel_size=2)


def check_tensor_and_pipeline_parallel(ranks: Ranks) -> None:
    compare(ranks, "qwen2", True, precision="bf16", tensor_model_parallel_size=2, pipeline_model_parallel_size=2)


def check_data_parallel_alone(ranks: Ranks) -> None:
    compare(ranks, "llama", False, precision="fp32")


if __name__ == "__main__":
    torch.manual_seed(0)
    run_checks(globals())
