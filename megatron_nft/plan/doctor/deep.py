"""Checks that load what the run loads, each with a time limit: a Transformer Engine layer, an engine server.

They return "" or one line that says why the run would fail at this.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from megatron_nft.config import Config
from megatron_nft.data.prompts import TOKENIZER_FILES
from megatron_nft.engines.engine import EngineError, Request, SamplingParams
from megatron_nft.engines.open import open_engine

LAYER_LIMIT_S = 180.0
ENGINE_LIMIT_S = 300.0
LAYER = """
import megatron_nft.policy  # chooses the cuDNN
import torch, transformer_engine.pytorch as te
layer = te.TransformerLayer(256, 512, 4, params_dtype=torch.bfloat16, device="cuda", hidden_dropout=0.0)
x = torch.randn(64, 1, 256, dtype=torch.bfloat16, device="cuda", requires_grad=True)
layer(x).float().square().mean().backward()
assert bool(torch.isfinite(x.grad).all()), "its gradient is not finite"
torch.backends.cudnn.version()  # raises where another cuDNN was loaded than torch was built for
"""
TINY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "max_window_layers": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "layer_types": ["full_attention"] * 2,
}
"""In place of the model's own sizes, where config.json has such a key. Eight heads suit any tensor_parallel_size."""


def transformer_engine_layer(limit_s: float = LAYER_LIMIT_S) -> str:
    """Transformer Engine imports, and one layer runs forward and backward on the first GPU."""
    return _run([sys.executable, "-c", LAYER], limit_s)


def _run(command: list[str], limit_s: float) -> str:
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=True)
    except subprocess.TimeoutExpired:
        return f"did not end within {limit_s:.0f} s"
    except subprocess.CalledProcessError as e:
        said = [line for line in (e.stderr or "").splitlines() if line.strip()]
        return said[-1] if said else f"ended with status {e.returncode}"
    return ""


def engine_answers(config: Config, folder: Path, device: str, limit_s: float = ENGINE_LIMIT_S) -> str:
    """A server of the settings starts on a tiny random model of the config's family, and answers.

    folder: gets the model and the server's log.
    """
    try:
        model = write_tiny_model(config.model.path, folder / "model")
    except (OSError, ValueError) as e:
        return f"no model of the kind of {config.model.path} can be made: {e}"
    changes: dict[str, Any] = {"num_servers": 1, "max_restarts": 0, "max_retries": 0, "router": False, "host": "auto"}
    changes |= {"urls": [], "registry": None, "memory_saver": False, "quantization": "none", "device": device}
    changes |= {"start_timeout_s": limit_s, "stall_timeout_s": limit_s}
    server = config.rollout.server.model_copy(update=changes)
    rollout = config.rollout.model_copy(update={"server": server})
    try:
        engine = open_engine(model, rollout, precision=config.policy.precision, log_dir=folder)
        try:
            request = Request(np.array([1, 2, 3, 4], dtype=np.int32), 1, (0,))
            list(engine.generate([request], SamplingParams(4)))
        finally:
            engine.close()
    except (EngineError, OSError, ValueError) as e:
        first, _, rest = str(e).partition("\n")
        last = rest.strip().splitlines()[-1:] or [""]
        return f"{first} {last[0].strip()}".strip()
    return ""


def write_tiny_model(source: Path, out: Path) -> Path:
    """A model with the config.json and the tokenizer of `source`, tiny and random. OSError, ValueError if it cannot."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    out.mkdir(parents=True, exist_ok=True)
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    values |= {key: value for key, value in TINY.items() if key in values}
    (out / "config.json").write_text(json.dumps(values), encoding="utf-8")
    auto: Any = AutoModelForCausalLM  # transformers gives its methods no types
    model = auto.from_config(AutoConfig.from_pretrained(out), dtype=torch.float32)
    model.save_pretrained(out)
    for name in (*TOKENIZER_FILES, "tokenizer_config.json", "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    return out
