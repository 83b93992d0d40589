"""`megatron-nft eval`: a model on maths benchmarks, by the NFT paper's protocol unless told otherwise."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_nft.config.engines import ENGINES
from megatron_nft.data.conflicts import add_conflicts_option
from megatron_nft.engines.open import engine_kind

if TYPE_CHECKING:
    import torch

    from megatron_nft.config import Config
    from megatron_nft.evaluate.evaluation import Parts
    from megatron_nft.evaluate.model_folder import ModelIdentity
    from megatron_nft.evaluate.protocol import Preset, Sampling
    from megatron_nft.evaluate.tasks import Task

DEFAULT_BENCHMARKS = "aime24,aime25,amc23,math500,olympiadbench,minerva"
DEFAULT_GRADERS = "maths,dapo_boxed"
OVERRIDABLE = ("rollout.server.", "rollout.embedded_batch_tokens", "rollout.stop_token_ids", "verify.")


@dataclass(slots=True)
class _OneRank:
    """What `open_engine` asks of the ranks, for an evaluation, which is one process."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    world_gloo: None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `eval`."""
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder in Hugging Face format")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results; run again to go on in it")
    parser.add_argument(
        "--benchmarks",
        default=DEFAULT_BENCHMARKS,
        metavar="A,B,...",
        help=f"names, or paths of .jsonl/.parquet question files (default: {DEFAULT_BENCHMARKS})",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of benchmark files (default: the hub)")
    parser.add_argument("--engine", choices=tuple(ENGINES), default="sglang")
    parser.add_argument(
        "--protocol",
        choices=("auto", "nft-7b", "nft-32b"),
        default="auto",
        help="sampling of the NFT paper: temperature 0.6 and 512+3584 tokens, or 1.0 and 1024+7168; auto: by size",
    )
    parser.add_argument("--samples", type=int, metavar="N", help="answers per question (default: the paper's 32 or 1)")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: the protocol's)")
    parser.add_argument("--top-p", type=float, help="default: the protocol's 0.7")
    parser.add_argument("--max-prompt-tokens", type=int, metavar="N", help="default: the protocol's")
    parser.add_argument("--max-response-tokens", type=int, metavar="N", help="default: the protocol's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each benchmark")
    add_conflicts_option(parser)
    parser.add_argument("--system-prompt", metavar="TEXT", help="put before every question")
    parser.add_argument("--chat-template", type=Path, metavar="FILE", help="Jinja file in place of the tokenizer's own")
    parser.add_argument(
        "--grader", default=DEFAULT_GRADERS, metavar="A,B", help=f"the first decides (default: {DEFAULT_GRADERS})"
    )
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on a GPU")
    parser.add_argument("--url", action="append", default=[], metavar="URL", help="a server that runs (repeatable)")
    parser.add_argument("--dry-run", action="store_true", help="print the settings and the first prompt, and stop")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="rollout.server.*, rollout.embedded_batch_tokens, rollout.stop_token_ids or verify.*",
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate; return 0 done, 1 where an engine or the verifier failed, 2 for bad settings, 130 interrupted."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _run(args)
    except KeyboardInterrupt:
        print(f"megatron-nft eval: interrupted; run the same command again to go on in {args.out}", file=sys.stderr)
        return 130
    except (ValueError, OSError) as e:
        print(f"megatron-nft eval: {e}", file=sys.stderr)
        return 2
    except RuntimeError as e:  # an engine or the verifier failed; what was answered is kept
        print(f"megatron-nft eval: {e}", file=sys.stderr)
        if (args.out / "protocol.json").exists():
            print(f"all answers so far are kept; run the same command again to go on in {args.out}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace) -> int:
    from megatron_nft.data.prompts import show_prompt
    from megatron_nft.engines.end_tokens import cut_off_note, describe, find_end_tokens, token_ids
    from megatron_nft.evaluate import evaluation
    from megatron_nft.evaluate.model_folder import inspect_model
    from megatron_nft.evaluate.summary import settings_rows, to_text
    from megatron_nft.evaluate.tasks import by_max_tokens, load_tasks, make_prompts

    _check_numbers(args)
    tasks = load_tasks(
        _names(args.benchmarks),
        _data_folder(args.data),
        samples=args.samples,
        limit=args.limit,
        conflicts=args.conflicts,
    )
    config = _config(args)
    inspect_model(args.model)
    tokenizer = _tokenizer(args)
    end_tokens = find_end_tokens(args.model, tokenizer, config.rollout.stop_token_ids)
    prompts = {t.name: make_prompts(t, tokenizer, args.system_prompt) for t in tasks}
    identity = _identify(args.model)
    preset, sampling = _sampling(args, identity.num_parameters)
    for task in tasks:
        by_max_tokens(prompts[task.name], sampling, identity.max_positions)  # refuses what has no room
    protocol = _protocol(args, config, tasks, preset, sampling, tokenizer, identity)
    for key, value in settings_rows(protocol):
        print(f"{key}: {value}")
    print(describe(end_tokens))
    if args.dry_run:
        first = tasks[0]
        print(f"first prompt ({first.name}), {show_prompt(tokenizer, prompts[first.name][0].token_ids)}")
        return 0
    with evaluation.claim_folder(args.out, protocol):
        answers = evaluation.run_tasks(
            tasks,
            prompts,
            sampling,
            identity.max_positions,
            tokenizer,
            args.out,
            lambda: _open_parts(args, config, token_ids(end_tokens)),
        )
        results = evaluation.make_results(tasks, prompts, answers, protocol)
        evaluation.write_results(args.out, results)
    for name, benchmark in results["benchmarks"].items():
        if note := cut_off_note(benchmark["truncated_share"], sampling.max_response_tokens, end_tokens):
            print(f"\n{name}: {note}")
    print(f"\n{to_text(results)}\n\nwritten: {args.out / 'results.md'}, results.json, results.html, answers/")
    return 0


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _check_numbers(args: argparse.Namespace) -> None:
    for name in ("samples", "limit", "max_prompt_tokens", "max_response_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if args.seed < 0:
        raise ValueError(f"--seed is {args.seed}; it must be 0 or more")
    if args.temperature is not None and args.temperature < 0:
        raise ValueError(f"--temperature is {args.temperature}; it must be 0 (greedy) or more")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p is {args.top_p}; it must be in (0, 1]")
    for text in args.overrides:
        if not text.startswith(OVERRIDABLE):
            raise ValueError(
                f"override {text!r}: eval takes rollout.server.*, rollout.embedded_batch_tokens, "
                "rollout.stop_token_ids, verify.*"
            )


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError("--benchmarks names nothing")
    return names


def _data_folder(given: Path | None) -> Path | None:
    """--data, else $NFT_DATA_DIR, else None for the hub."""
    if given is not None:
        return given
    return Path(os.environ["NFT_DATA_DIR"]) if os.environ.get("NFT_DATA_DIR") else None


def _config(args: argparse.Namespace) -> Config:
    """Return the settings that the engine and the verifier read, checked as those of training are."""
    from megatron_nft.config import load_config

    base = {
        "run_dir": str(args.out),
        "model.path": str(args.model),
        "data.train": [str(args.model / "config.json")],  # required, and not read by an evaluation
        "rollout.engine": args.engine,
        "rollout.server.urls": args.url,
        "verify.grader": args.grader,
        "policy.precision": _precision(args.precision),
    }
    return load_config([], [*(f"{key}={json.dumps(value)}" for key, value in base.items()), *args.overrides])


def _precision(asked: str) -> str:
    if asked != "auto":
        return asked
    return "bf16" if _device().type == "cuda" else "fp32"


def _device() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _sampling(args: argparse.Namespace, num_parameters: int) -> tuple[Preset, Sampling]:
    """Return the protocol's sampling, overlaid by what was asked for."""
    from megatron_nft.evaluate.protocol import PRESETS, Sampling, preset_for

    preset = preset_for(num_parameters) if args.protocol == "auto" else PRESETS[args.protocol]
    asked = {name: getattr(args, name) for name in ("temperature", "top_p", "max_prompt_tokens", "max_response_tokens")}
    values = {name: getattr(preset, name) if value is None else value for name, value in asked.items()}
    return preset, Sampling(**values, seed=args.seed)


def _tokenizer(args: argparse.Namespace) -> Any:
    from megatron_nft.data.prompts import load_tokenizer

    return load_tokenizer(args.model, args.chat_template)


def _identify(model: Path) -> ModelIdentity:
    from megatron_nft.console import show_progress
    from megatron_nft.evaluate.model_folder import identify_model, weight_bytes
    from megatron_nft.weights.hf_check import check_model_folder

    if note := check_model_folder(model):
        print(note, file=sys.stderr)
    with show_progress("checksum of the model", weight_bytes(model), in_bytes=True) as progress:
        return identify_model(model, on_bytes=progress.advance)


def _protocol(
    args: argparse.Namespace,
    config: Config,
    tasks: list[Task],
    preset: Preset,
    sampling: Sampling,
    tokenizer: Any,
    identity: ModelIdentity,
) -> dict[str, Any]:
    from megatron_nft.evaluate.protocol import build_protocol, describe_benchmark, digest
    from megatron_nft.evaluate.versions import package_versions
    from megatron_nft.verify.graders import RULES

    server = config.rollout.server
    return build_protocol(
        preset=preset.name,
        benchmarks={t.name: describe_benchmark(t.questions, t.samples) for t in tasks},
        sampling=sampling,
        prompt={
            "system_prompt": args.system_prompt,
            "chat_template_sha256": digest(tokenizer.chat_template) if tokenizer.chat_template else None,
        },
        grading={
            "graders": config.verify.grader,
            "rules": RULES,
            "timeout_s": config.verify.timeout_s,
            "memory_bytes": config.verify.memory_bytes,
        },
        model=identity,
        engine={
            "name": args.engine,
            "version": engine_kind(args.engine).version(args.model, server),
            "precision": config.policy.precision,
            "quantization": server.quantization,
            **({"stop_token_ids": config.rollout.stop_token_ids} if config.rollout.stop_token_ids else {}),
        },
        versions=package_versions(),
    )


@contextmanager
def _open_parts(args: argparse.Namespace, config: Config, stop_token_ids: tuple[int, ...]) -> Iterator[Parts]:
    """Open engine and verifier; both are closed whatever happens."""
    from megatron_nft.engines.open import open_engine
    from megatron_nft.evaluate.evaluation import Parts
    from megatron_nft.verify import VerifierPool

    with VerifierPool(config.verify) as verifier:
        engine = open_engine(
            args.model,
            config.rollout,
            precision=config.policy.precision,
            log_dir=args.out / "engines",
            layout=_OneRank(_device()),
        )
        try:
            yield Parts(engine, verifier, stop_token_ids)
        finally:
            engine.close()
