"""What can be refused before any rank starts: bad files, folders that cannot be written, impossible layouts."""

from __future__ import annotations

import json
import os
from pathlib import Path

from megatron_nft.config import Config, ModelConfig
from megatron_nft.data.prompts import TOKENIZER_FILES
from megatron_nft.policy.family import ModelSpec, check_layout, read_family
from megatron_nft.policy.positions import check_positions
from megatron_nft.policy.precision import check_sizes
from megatron_nft.policy.stack import check_stack, read_stack


def check_inputs(config: Config) -> None:
    """Raises ValueError or OSError with one clear line for the first problem found."""
    check_stack(read_stack())
    spec = check_without_torch(config)
    _check_writable(config.run_dir)
    _check_graders(config.verify.grader)
    _check_choice(config)
    import torch

    from megatron_nft.engines.transports import check_transport
    from megatron_nft.policy.capability import check_without_gpu
    from megatron_nft.weights.hf_check import check_folder
    from megatron_nft.weights.hf_folder import HFFolder

    check_transport(config, "cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        check_without_gpu(config.policy)
    _check_prompts(config)
    check_folder(HFFolder(config.model.path), spec)


def check_without_torch(config: Config) -> ModelSpec:
    """The part of `check_inputs` for a login node: seconds, and neither torch nor a grader is imported. The same
    errors. Returns the model."""
    _check_files(config)
    _check_tokenizer(config.model.path)
    spec = read_family(config.model.path)
    check_layout(spec, config.policy)
    check_sizes(spec, config.policy)
    _check_architecture(config.model)
    check_positions(spec, config)
    return spec


def _check_prompts(config: Config) -> None:
    """Every prompt as each rank will make it: what the chat template refuses is one line now, not one from each."""
    from megatron_nft.data.prompts import PromptStream, load_tokenizer
    from megatron_nft.engines.end_tokens import find_end_tokens

    tokenizer = load_tokenizer(config.model.path, config.model.chat_template)
    find_end_tokens(config.model.path, tokenizer, config.rollout.stop_token_ids)
    for paths in (config.data.train, *([path] for path in config.eval.data)):
        PromptStream(
            paths,
            tokenizer,
            config.data.max_prompt_tokens,
            config.data.over_long,
            system_prompt=config.model.system_prompt,
        )


def _check_tokenizer(folder: Path) -> None:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(
            f"model folder {folder}: has no tokenizer (none of {', '.join(TOKENIZER_FILES)}); "
            "copy the tokenizer files of the model into it"
        )


def _check_architecture(model: ModelConfig) -> None:
    """`model.architecture`, which stands in for the folder in `plan`, must not say otherwise than the folder."""
    values = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
    for key, value in (model.architecture or {}).items():
        if key in values and values[key] != value:
            raise ValueError(f"model.architecture: {key} is {value!r}, config.json has {values[key]!r}")


def _check_files(config: Config) -> None:
    if not config.model.path.is_dir():
        raise ValueError(f"model.path {config.model.path}: not a folder; give a model in Hugging Face format")
    files = [("data.train", p) for p in config.data.train] + [("eval.data", p) for p in config.eval.data]
    if config.model.chat_template is not None:
        files.append(("model.chat_template", config.model.chat_template))
    for key, path in files:
        if not path.is_file():
            raise ValueError(f"{key}: {path} is not a file")
        if path.stat().st_size == 0:
            raise ValueError(f"{key}: {path} is empty")


def _check_writable(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".write-test-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as e:
        raise ValueError(f"run_dir {run_dir} cannot be written: {e.strerror or e}") from None


def _check_graders(names: str) -> None:
    from megatron_nft.verify.graders import load, split_names

    for name in split_names(names):
        load(name)


def _check_choice(config: Config) -> None:
    from megatron_nft.data.choice import load_choice

    if config.data.choose is not None:
        load_choice(config.data.choose, config.seed)
