"""FP8 against bf16 training: the same model, data and order for 300 supervised steps, the loss along the way."""

from __future__ import annotations

import numpy as np
from gpu_common import ROOT, Results, free_memory
from gpu_task import make_task_policy, start_model, supervised_steps, teacher_samples

from megatron_nft.config import PolicyConfig
from megatron_nft.policy import parallel
from megatron_nft.policy.capability import allowed_recipes, read_gpu_stack

STEPS, MARKS = 300, (50, 100, 200, 300)


def measure(layout, model, samples, recipe: str, **fp8: object) -> dict:
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    FP8GlobalStateManager.reset()  # the scales of the recipe before
    policy = make_task_policy(layout, model, fp8={"recipe": recipe, **fp8})
    losses = supervised_steps(policy, samples, STEPS)
    return {f"loss, steps {m - 19} to {m}": float(np.mean(losses[m - 20 : m])) for m in MARKS}


def main() -> None:
    results = Results("fp8_curve", "113M parameters, steps3, 256 solutions a step, lr 3e-4; mean loss of 20 steps.")
    layout = parallel.initialize(PolicyConfig(), seed=1)
    model, samples = start_model(ROOT / "runs" / "gpu" / "start"), teacher_samples()
    for recipe in allowed_recipes(read_gpu_stack()):
        results.measure(recipe, lambda recipe=recipe: measure(layout, model, samples, recipe))
        free_memory()
    ends = {"num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 1}
    results.measure(
        "tensorwise, first and last layer in bf16", lambda: measure(layout, model, samples, "tensorwise", **ends)
    )


if __name__ == "__main__":
    main()
