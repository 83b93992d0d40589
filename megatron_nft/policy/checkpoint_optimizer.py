"""Optimizer state in a checkpoint: what torch's AdamW lacks, and what megatron-core 0.16.1 gets wrong with it."""

from __future__ import annotations

import torch

from megatron_nft.policy.optimizer import optimizer_parts
from megatron_nft.policy.policy import Policy


def _adams(policy: Policy) -> list[torch.optim.Optimizer]:
    """torch's AdamWs in use; empty with Transformer Engine's or apex's, which Megatron fills by itself."""
    return [
        part.optimizer for part in optimizer_parts(policy.optimizer) if isinstance(part.optimizer, torch.optim.AdamW)
    ]


def fill_adam_state(policy: Policy) -> None:
    """torch's AdamW has no state before its first step; saving and loading need tensors to name."""
    for adam in _adams(policy):
        for parameter in (p for group in adam.param_groups for p in group["params"]):
            if not adam.state[parameter]:
                adam.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def separate_steps(policy: Policy) -> None:
    """Give every parameter its own `step`. megatron-core 0.16.1 loads one tensor into all of them, so that a step
    counts once per parameter and the bias correction of the resumed run is silently wrong."""
    for adam in _adams(policy):
        for state in adam.state.values():
            state["step"] = state["step"].clone()
