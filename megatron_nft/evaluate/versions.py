"""Versions of the software that makes an evaluation, for its protocol."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from megatron_nft import __version__

PACKAGES = ("torch", "transformers", "tokenizers", "math-verify")


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that change what is asked, answered or graded."""
    found = {"megatron_nft": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found
