"""Which cuDNN Transformer Engine loads: the one that torch was built for.

A machine may have a second cuDNN, in the CUDA toolkit or from a module of the site. torch from PyPI brings its own
(`nvidia/cudnn` beside it) and loads that. Transformer Engine looks elsewhere first (2.11, `common/__init__.py`,
`_load_cuda_library_from_system`: CUDNN_HOME, CUDNN_PATH, CUDA_HOME, CUDA_PATH, /usr/local/cuda, LD_LIBRARY_PATH), and
two versions in one process end in errors of torch or of cuDNN's own parts. CUDNN_HOME, its first choice, is therefore
set before anything imports it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

from megatron_nft.processes import BEFORE, set_own_variable

VARIABLE = "CUDNN_HOME"


def bundled_cudnn() -> Path | None:
    """The folder of the cuDNN that torch brings with it; None where torch uses that of the system, or has none."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return None
    try:
        wanted = any(r.startswith("nvidia-cudnn") for r in importlib.metadata.requires("torch") or ())
    except importlib.metadata.PackageNotFoundError:
        return None
    libraries = sorted(Path(torch.origin).parents[1].glob("nvidia/*/lib/libcudnn.so*"))
    return libraries[0].parents[1] if wanted and libraries else None


def use_bundled_cudnn() -> None:
    """Make Transformer Engine load torch's own cuDNN, whatever else is installed. Does nothing where there is none."""
    if (folder := bundled_cudnn()) is not None:
        set_own_variable(VARIABLE, str(folder))


def cudnn_versions() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(version that torch was built for, version that is loaded), for example ((9, 19, 0), (9, 14, 0)).

    Empty tuples where torch has no cuDNN. Never fails, unlike torch.backends.cudnn.version(), which raises where the
    loaded one is older.
    """
    try:
        from torch._C import _cudnn  # absent from builds without CUDA
    except ImportError:
        return (), ()
    return tuple(_cudnn.getCompileVersion()), tuple(_cudnn.getRuntimeVersion())


def fits_torch(built: tuple[int, ...], loaded: tuple[int, ...]) -> bool:
    """Whether torch works with the loaded version: that of its build, or a later one with the same first number."""
    return not built or (loaded[:1] == built[:1] and loaded[:2] >= built[:2])


def other_cudnns() -> list[str]:
    """Libraries beside torch's own that Transformer Engine would find by its rules, each where it really lies."""
    own = bundled_cudnn()
    homes = [os.environ.get(BEFORE + VARIABLE) or os.environ.get(VARIABLE)]
    homes += [os.environ.get(name) for name in ("CUDNN_PATH", "CUDA_HOME", "CUDA_PATH")]
    folders = [Path(home) / lib for home in (*filter(None, homes), "/usr/local/cuda") for lib in ("lib", "lib64")]
    folders += [Path(folder) for folder in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if folder]
    folders += [Path("/usr/lib", f"{platform.machine()}-linux-gnu"), Path("/usr/lib64")]
    found = {library.resolve() for folder in folders for library in folder.glob("libcudnn.so*")}
    return sorted(str(library) for library in found if own is None or not library.is_relative_to(own.resolve()))
