"""Megatron's Adam with fp32 master weights, and its schedule counted in optimizer steps.

Norms and biases are not decayed. megatron-core needs two things for that, and silently decays them if one is missing:
`get_standard_config_overrides`, and an OptimizerParamScheduler, which is what writes each group's `weight_decay`.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_nft import config as settings


def build_optimizer(
    chunks: list[DistributedDataParallel], config: settings.Config, num_optimizer_steps: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Optimizer and schedule; `num_optimizer_steps` is where a decaying schedule ends.

    ValueError for an optimizer that cannot be offloaded.
    """
    if config.policy.optimizer_offload:
        _check_offload()
    optimizer_config = megatron_config(config.optimizer, config.policy)
    optimizer = get_megatron_optimizer(
        optimizer_config,
        chunks,
        config_overrides=get_standard_config_overrides(optimizer_config),
        use_gloo_process_groups=torch.cuda.is_available(),
    )
    return optimizer, build_schedule(optimizer, config.optimizer, num_optimizer_steps)


def _check_offload() -> None:
    if not torch.cuda.is_available():
        raise ValueError(
            "policy.optimizer_offload=true needs a GPU: without one the optimizer is in host memory anyway"
        )
    if importlib.util.find_spec("transformer_engine") is None:  # megatron-core 0.16.1 asks it for its version
        raise ValueError("policy.optimizer_offload=true needs Transformer Engine; install the extra `te`")


def megatron_config(optimizer: settings.OptimizerConfig, policy: settings.PolicyConfig) -> OptimizerConfig:
    """Our settings under Megatron's names."""
    # With `use_precision_aware_optimizer` the host optimizer holds the only fp32 masters and reads them from the
    # loaded weights; without it megatron-core keeps masters on the device too, and what is loaded never reaches the
    # host's.
    offload = {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": 1.0,
        "overlap_cpu_optimizer_d2h_h2d": True,
        "use_precision_aware_optimizer": True,
    }
    return OptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=min(optimizer.min_lr, optimizer.lr),
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        bf16=policy.precision == "bf16",
        params_dtype=torch.bfloat16 if policy.precision == "bf16" else torch.float32,
        use_distributed_optimizer=policy.use_distributed_optimizer,
        overlap_param_gather=policy.overlap_param_gather,
        **(offload if policy.optimizer_offload else {}),
    )


ADAMS = {"transformer_engine": "Transformer Engine's fused Adam", "apex": "apex's fused Adam", "torch": "torch's AdamW"}
"""Top-level package of the class -> what to call it. megatron-core takes the first of these that is installed."""


def optimizer_parts(optimizer: MegatronOptimizer) -> list[Any]:
    """Megatron's optimizers inside `optimizer`: one, or one for dense and one for expert parameters."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def describe(optimizer: MegatronOptimizer) -> str:
    """Which Adam does the work and where, for people: "torch's AdamW, sharded over data-parallel ranks"."""
    part = optimizer_parts(optimizer)[0]
    inner = part.optimizer
    offloaded = isinstance(inner, HybridDeviceOptimizer)
    kind = inner.cpu_optimizer_cls if offloaded else type(inner)
    named = ADAMS.get(kind.__module__.split(".")[0], f"{kind.__module__}.{kind.__qualname__}")
    where = " on the host, transfers overlapped" if offloaded else ""
    return named + where + (", sharded over data-parallel ranks" if part.config.use_distributed_optimizer else "")


def build_schedule(
    optimizer: MegatronOptimizer, config: settings.OptimizerConfig, num_optimizer_steps: int
) -> OptimizerParamScheduler:
    """Linear warm-up, then constant, linear or cosine; call `.step(1)` *before* each optimizer step.

    Megatron's schedule counts from 0, where warm-up has lr 0. Stepped before the update, the first of W warm-up steps
    has lr / W and step W has lr.
    """
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0 if config.lr_warmup_steps else config.lr,
        max_lr=config.lr,
        min_lr=min(config.min_lr, config.lr),
        lr_warmup_steps=config.lr_warmup_steps,
        lr_decay_steps=max(num_optimizer_steps, config.lr_warmup_steps + 1),
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
