"""The optimizer step: gradient norm, the decision to skip, clipping, update. All ranks decide the same."""

from __future__ import annotations

import math

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


@torch.no_grad()
def update(optimizer: MegatronOptimizer, schedule: OptimizerParamScheduler, loss_sum: float) -> tuple[float, str]:
    """(gradient norm before clipping, why the step was skipped or ""). A skipped step leaves weights, optimizer state
    and schedule as they were.

    Both `loss_sum` and the norm are reduced over all ranks, so no further agreement is needed.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(loss_sum):
        return norm, f"the loss is {loss_sum}"
    if not math.isfinite(norm):
        return norm, f"the gradient norm is {norm}"
    schedule.step(1)
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            # with the optimizer on the host, gradients stand in `decoupled_grad`
            decoupled = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, norm, use_decoupled_grad=decoupled)
    optimizer.step_with_ready_grads()
    return norm, ""
