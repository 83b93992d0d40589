"""SGLang servers for the measurements: of Qwen2.5-7B's shape with weights of no meaning, or of a real folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpu_common import ROOT, figures_7b
from gpu_engines import LEAST_COMPILATION, server_settings

from megatron_nft.config import Config
from megatron_nft.data.synthetic import make_tokenizer
from megatron_nft.engines.engine import Engine
from megatron_nft.engines.open import create_engine
from megatron_nft.policy.parallel import ParallelLayout


def folder_7b(num_layers: int = 28) -> Path:
    """config.json and a tokenizer; the weights are made up by `--load-format=dummy`."""
    folder = ROOT / "runs" / "gpu" / f"shape_7b_{num_layers}"
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer().save_pretrained(folder)
    figures = figures_7b(num_layers) | {
        "architectures": ["Qwen2ForCausalLM"],
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(figures))
    return folder


def config_for(model: Path, *, server: dict | None = None, sync: dict | None = None, **policy: object) -> Config:
    """Settings of a run on this GPU with one SGLang server."""
    return Config.model_validate(
        {
            "run_dir": str(ROOT / "runs" / "gpu" / "engine"),
            "model": {"path": str(model)},
            "data": {"train": ["unused"]},
            "rollout": {"engine": "sglang", "server": server_settings(**(server or {}))},
            "policy": policy,
            "sync": sync or {},
        }
    )


def dummy(**changes: object) -> dict:
    """Server settings of a 7B-shaped model without weights."""
    return {"extra_args": [*LEAST_COMPILATION, "--load-format=dummy"], "mem_fraction_static": 0.5, **changes}


@contextmanager
def running(config: Config, layout: ParallelLayout) -> Iterator[Engine]:
    """A server and its client, ended with the block."""
    engine = create_engine(config, layout)
    try:
        yield engine
    finally:
        engine.close()
