"""Stands in for SGLang's compiled kernels on a CPU: every name exists, and calling one says that it is missing.

SGLang imports `sgl_kernel` in any case; with the torch_native attention and the pytorch sampler no kernel is called.
All versions in setup.py's range need this: 0.5.23 fails at `import sglang.srt.managers.scheduler` without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} needs a GPU build of SGLang")

    missing.__name__ = name
    return missing
