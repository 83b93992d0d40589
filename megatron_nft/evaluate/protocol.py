"""The protocol of an evaluation: what was asked, how, of which model, with which software. It is written and hashed.

Two results can be compared when their protocols are equal; the model is the one thing that may differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_nft.data.benchmarks import Question
from megatron_nft.evaluate.model_folder import ModelIdentity
from megatron_nft.verify.graders import current_name

FORMAT = 1
"""Version of protocol.json, results.json and the answer files; a result of another version is refused."""

LARGE_MODEL = 20_000_000_000
"""Parameters from which the paper's 32B protocol is the default."""


@dataclass(frozen=True, slots=True)
class Preset:
    """Sampling settings of the NFT paper's offline evaluation."""

    name: str
    temperature: float
    top_p: float
    max_prompt_tokens: int
    max_response_tokens: int


PRESETS = {
    p.name: p
    for p in (
        Preset("nft-7b", temperature=0.6, top_p=0.7, max_prompt_tokens=512, max_response_tokens=3584),
        Preset("nft-32b", temperature=1.0, top_p=0.7, max_prompt_tokens=1024, max_response_tokens=7168),
    )
}


def preset_for(num_parameters: int) -> Preset:
    """Return the paper's protocol for a model of this size."""
    return PRESETS["nft-32b" if num_parameters >= LARGE_MODEL else "nft-7b"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn."""

    temperature: float  # 0 is greedy
    top_p: float
    max_prompt_tokens: int
    max_response_tokens: int
    seed: int


def describe_benchmark(questions: Sequence[Question], samples: int) -> dict[str, Any]:
    """Return a benchmark's part of the protocol: how many questions and answers, and a digest of what is asked."""
    asked = [[list(map(dict, q.messages)), q.answer] for q in questions]
    return {"questions": len(questions), "samples": samples, "prompts_sha256": digest(asked)}


def build_protocol(
    *,
    preset: str,
    benchmarks: Mapping[str, dict[str, Any]],
    sampling: Sampling,
    prompt: Mapping[str, Any],
    grading: Mapping[str, Any],
    model: ModelIdentity,
    engine: Mapping[str, Any],
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """Return the whole protocol with its two hashes.

    `protocol_hash` covers everything but the model; `run_hash` covers the model too, and a folder is resumed only
    under the same one. The model's path is for people and in neither.
    """
    body = {
        "preset": preset,
        "benchmarks": {name: dict(part) for name, part in benchmarks.items()},
        "sampling": asdict(sampling),
        "prompt": dict(prompt),
        "grading": _with_current_graders(grading),
        "engine": dict(engine),
        "versions": dict(versions),
    }
    identity = asdict(model)
    path = identity.pop("path")
    return {
        "format": FORMAT,
        "protocol_hash": digest(body),
        "run_hash": digest({**body, "model": identity}),
        **body,
        "model": {"path": path, **identity},
    }


def differences(first: Mapping[str, Any], second: Mapping[str, Any], *, with_model: bool = False) -> list[str]:
    """List the settings that differ, `key: value against value`, of the benchmarks that both protocols have."""
    left, right = (
        _flatten(_comparable(protocol, other, with_model)) for protocol, other in ((first, second), (second, first))
    )
    return [
        f"{key}: {left.get(key, 'absent')} against {right.get(key, 'absent')}"
        for key in sorted({*left, *right})
        if left.get(key) != right.get(key)
    ]


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _with_current_graders(grading: Mapping[str, Any]) -> dict[str, Any]:
    """Return the grading settings with the graders' names of today; a renamed grader is no other grader."""
    if "graders" not in grading:
        return dict(grading)
    names = grading["graders"].split(",")
    renamed = (name.replace(name.strip(), current_name(name.strip())) if name.strip() else name for name in names)
    return {**grading, "graders": ",".join(renamed)}


def _comparable(protocol: Mapping[str, Any], other: Mapping[str, Any], with_model: bool) -> dict[str, Any]:
    left_out = {"format", "protocol_hash", "run_hash", "preset"} | (set() if with_model else {"model"})
    kept = {key: value for key, value in protocol.items() if key not in left_out}
    kept["grading"] = _with_current_graders(protocol["grading"])
    if with_model:
        kept["model"] = {key: value for key, value in protocol["model"].items() if key != "path"}
    else:
        shared = protocol["benchmarks"].keys() & other["benchmarks"].keys()
        kept["benchmarks"] = {name: protocol["benchmarks"][name] for name in shared}
    return kept


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, part in value.items():
        flat.update(_flatten(part, f"{prefix}.{key}" if prefix else str(key)))
    return flat
