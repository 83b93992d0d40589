"""Makes megatron-core run without CUDA. Nothing here acts when a CUDA device is there.

megatron-core calls `torch.cuda.*` and writes `device="cuda"`, `tensor.cuda()` and `"torch.cuda.FloatTensor"` in its
schedules, gradient clipping and optimizers. Two mechanisms cover all of it:

- `REPLACED`: the functions that are replaced for the whole process, each with what stands in for it;
- `on_cpu()`: a torch-function mode that maps device arguments to the CPU. It costs time on every torch call, so it is
  active only inside the calls into Megatron, not while an engine generates.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_nft.policy.megatron_versions import ONLY_WITH_TRANSFORMER_ENGINE
from megatron_nft.policy.stack import table

CPU = torch.device("cpu")


class NoStream:
    """Stands in for a CUDA stream: everything has already happened."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, _: Any) -> None:
        pass

    def record_event(self, _: Any = None) -> NoStream:
        return self

    def synchronize(self) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NoStream)

    def __hash__(self) -> int:
        return 0


def _set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _with_step(original: Callable[..., None]) -> Callable[..., None]:
    """Wraps DistributedOptimizer._set_main_param_and_optimizer_states(self, model_param, tensors), which copies every
    tensor of a parameter's state from `tensors`. torch's AdamW has a `step` there, which megatron-core loads elsewhere
    and leaves out of `tensors`."""

    def set_states(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state and "step" not in tensors:
            tensors = {**tensors, "step": state["step"]}
        original(self, model_param, tensors)

    return set_states


def _on_host(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps maybe_move_tensor_to_cpu, which does nothing, not even `as_numpy`, for a tensor that is on the CPU."""

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    return move


DISTRIBUTED_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer"

REPLACED: dict[tuple[str, str], Callable[[Any], Any]] = {
    ("torch.cuda", "current_device"): lambda _: lambda: CPU,
    ("torch.cuda", "current_stream"): lambda _: NoStream,
    ("torch.cuda", "default_stream"): lambda _: NoStream,
    ("torch.cuda", "Stream"): lambda _: NoStream,
    ("torch.cuda", "stream"): lambda _: lambda stream: contextlib.nullcontext(),
    ("torch.cuda", "synchronize"): lambda _: lambda device=None: None,
    ("torch.cuda", "get_rng_state"): lambda _: lambda device="cpu": torch.get_rng_state(),
    ("torch.cuda.random", "get_rng_state"): lambda _: lambda device="cpu": torch.get_rng_state(),
    ("torch.cuda", "manual_seed"): lambda _: lambda seed: torch.default_generator.manual_seed(seed),
    ("megatron.core.tensor_parallel.random", "_set_cuda_rng_state"): lambda _: _set_rng_state,
    ("megatron.core.transformer.moe.token_dispatcher", "maybe_move_tensor_to_cpu"): _on_host,
    (DISTRIBUTED_OPTIMIZER, "DistributedOptimizer._set_main_param_and_optimizer_states"): _with_step,
}
"""(module, dotted name) -> what makes the stand-in from the original, where no CUDA device exists."""


class OnCpu(TorchFunctionMode):
    """Maps CUDA device arguments, `tensor.cuda()` and the CUDA names of tensor types to the CPU's."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs and (device := kwargs.get("device")) is not None and str(device).startswith("cuda"):
            kwargs = {**kwargs, "device": CPU}
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(result, str):  # t.type() == "torch.cuda.FloatTensor"
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def resolve(module: str, name: str) -> tuple[Any, str, Any]:
    """(owner, attribute, object) of `module.name`. RuntimeError when the installed packages no longer have it."""
    try:
        owner = importlib.import_module(module)
        *path, attribute = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        return owner, attribute, getattr(owner, attribute)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"{module}.{name} does not exist in the installed packages (megatron-core {version('megatron-core')}, "
            f"torch {torch.__version__}): adapt the table REPLACED of megatron_nft/policy/cpu.py, or install versions "
            f"that were tested together:\n{table()}"
        ) from error


@functools.cache
def install() -> bool:
    """Replace the names of `REPLACED`. False, and nothing done, where CUDA is available. Later calls do nothing."""
    if torch.cuda.is_available():
        return False
    found = {key: resolve(*key) for key in REPLACED}  # all exist, or none is replaced
    for key, (owner, attribute, original) in found.items():
        setattr(owner, attribute, REPLACED[key](original))
    for (module, name), value in ONLY_WITH_TRANSFORMER_ENGINE.items():
        owner = importlib.import_module(module)
        setattr(owner, name, getattr(owner, name, value))
    return True


_ACTIVE = contextvars.ContextVar("on_cpu_active", default=False)


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Context for every call into Megatron. Does nothing where CUDA is available, or inside itself."""
    if torch.cuda.is_available() or _ACTIVE.get():
        yield
        return
    token = _ACTIVE.set(True)
    try:
        with OnCpu():
            yield
    finally:
        _ACTIVE.reset(token)
