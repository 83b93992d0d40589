"""What one Python environment holds, as a line of JSON: run by the interpreter of that environment.

    python probe.py PACKAGE …

Standard library and torch alone: the environment of an engine has nothing of ours.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from typing import Any


def installed(names: list[str]) -> dict[str, str]:
    """Versions of those of the distributions that are there."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def torch_facts() -> dict[str, Any]:
    """Versions of torch and of what it is built with; `cudnn` are [of the build, loaded]."""
    import torch

    facts: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    try:
        from torch._C import _cudnn

        facts["cudnn"] = [list(_cudnn.getCompileVersion()), list(_cudnn.getRuntimeVersion())]
    except ImportError:
        facts["cudnn"] = None
    try:
        version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]  # torch has no type
        facts["nccl"] = ".".join(map(str, version))
    except AttributeError:  # a build without it
        facts["nccl"] = None
    return facts


def main() -> None:
    """Print the facts."""
    facts: dict[str, Any] = {"python": platform.python_version(), "packages": installed(sys.argv[1:])}
    try:
        facts |= torch_facts()
    except Exception as e:  # whatever a broken installation raises
        facts["problem"] = f"import torch: {type(e).__name__}: {str(e).strip().splitlines()[0] if str(e) else ''}"
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
