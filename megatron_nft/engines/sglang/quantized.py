"""Which releases of SGLang bring live updates of which models into FP8 weights: its loader `flash_rl`, as released.

    up to 0.5.20    quantizes every tensor that is not on a list of names: query and key norms, which stay in 16 bits,
                    would get FP8 values without their scales. Fused experts are not known
    0.5.21          the end of an update session quantizes what is quantized already
    from 0.5.22     only what is FP8 in the server is quantized, so that query and key norms stay as they are; models
                    whose loader does not say that it suits this are refused at the start (Qwen2 and Qwen3 do)

Read in `sglang/srt/model_loader/loader.py` (QuantizedRLModelLoader) and `models/` of 0.5.17 to 0.5.23.
"""

from __future__ import annotations

from dataclasses import dataclass

from packaging.version import InvalidVersion, Version

LATEST_READ = "0.5.23"


@dataclass(frozen=True)
class _Releases:
    """Releases from `first` on and before `end`, and the model families that they update."""

    text: str
    first: str
    end: str
    families: frozenset[str]


RELEASES = (
    _Releases("0.5.20 or older", "0", "0.5.21.dev0", frozenset({"qwen2", "llama"})),
    _Releases("0.5.21", "0.5.21.dev0", "0.5.22.dev0", frozenset()),
    _Releases("0.5.22 or newer", "0.5.22.dev0", "9999", frozenset({"qwen2", "qwen3"})),
)


def check_release(version: str, family: str) -> None:
    """ValueError where SGLang `version` does not bring live updates of a `family` into FP8 weights. It names the
    releases that do. A version that cannot be read must be one of any."""
    try:
        number = Version(version)
        ours = [r for r in RELEASES if Version(r.first) <= number < Version(r.end)]
    except InvalidVersion:
        ours = [r for r in RELEASES if r.families]
    if all(family in releases.families for releases in ours):
        return
    able = [releases.text for releases in RELEASES if family in releases.families]
    raise ValueError(
        f"rollout.server.quantization=fp8 with SGLang {version or 'of unknown version'}: live updates of a {family} "
        f"model into FP8 weights come out wrong or are refused by it; releases that can: "
        f"{', '.join(able) or f'none up to {LATEST_READ}'}. Else use rollout.server.quantization=none"
    )
