"""What the GPU measurements share: rows that survive an interruption, timing, and the ceilings of the card."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_nft.policy.cudnn import cudnn_versions

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "transformer-engine", "megatron-core", "transformers", "sglang")


def machine() -> str:
    """Date, GPU, driver and versions, for the head of a table."""
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: these measurements need a GPU")
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    card = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60).stdout.strip().splitlines()
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    name = card[0] if card else torch.cuda.get_device_name()
    cudnn = " for ".join(".".join(map(str, v)) for v in reversed(cudnn_versions()))  # that is loaded, of torch's build
    return f"{datetime.date.today()}, {name}, CUDA {torch.version.cuda}, cuDNN {cudnn}, {', '.join(versions)}"


class Results:
    """Rows of one part: appended to OUT/results.jsonl as they come, shown in OUT/tables.md."""

    def __init__(self, part: str, note: str) -> None:
        self.part, self._machine, self._note = part, machine(), note
        self._folder = Path(os.environ.get("OUT", ROOT / "benchmarks" / "results" / "gpu"))
        self._folder.mkdir(parents=True, exist_ok=True)

    def all_rows(self) -> list[dict]:
        path = self._folder / "results.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def get(self, row: str) -> dict | None:
        """The figures of a row that was measured before, or None."""
        found = [
            r for r in self.all_rows() if (r["part"], r["row"]) == (self.part, row) and "failed" not in r["figures"]
        ]
        return found[-1]["figures"] if found else None

    def add(self, row: str, **figures: object) -> dict:
        """Keep a row and rewrite the tables."""
        entry = {"part": self.part, "row": row, "figures": figures, "machine": self._machine, "note": self._note}
        with (self._folder / "results.jsonl").open("a") as f:
            f.write(json.dumps(entry) + "\n")
        (self._folder / "tables.md").write_text(tables(self.all_rows()))
        print(f"{self.part} | {row} | " + ", ".join(f"{k} {show(v)}" for k, v in figures.items()), flush=True)
        return figures

    def measure(self, row: str, work: Callable[[], dict], *, again: bool = False) -> dict | None:
        """`work()` as a row, unless it is there. A failure is a row of its own and does not end the part."""
        known = None if again else self.get(row)
        if known is not None:
            print(f"{self.part} | {row} | measured before", flush=True)
            return known
        try:
            figures = self.add(row, **work())
        except Exception as e:
            traceback.print_exc()
            figures = None
            self.add(row, failed=f"{type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ''}")
        free_memory()
        return figures


def show(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def verdict(value: float, *, at_most: float | None = None, at_least: float | None = None) -> str:
    """What a table says of a target: "met (51.2, at most 58.6)"."""
    limit = at_least if at_most is None else at_most
    met = value <= limit if at_least is None else value >= limit
    return f"{'met' if met else 'missed'} ({show(float(value))}, at {'least' if at_most is None else 'most'} {limit:g})"


def tables(rows: list[dict]) -> str:
    """Markdown: one table per part; of rows measured twice the last."""
    out = []
    for part in dict.fromkeys(r["part"] for r in rows):
        mine = {r["row"]: r for r in rows if r["part"] == part}
        columns = list(dict.fromkeys(name for r in mine.values() for name in r["figures"]))
        last = list(mine.values())[-1]
        out += [f"## {part}", "", last["note"], "", last["machine"], ""]
        out += ["| " + " | ".join(["", *columns]) + " |", "|" + "---|" * (len(columns) + 1)]
        for name, r in mine.items():
            out.append("| " + " | ".join([name, *(show(r["figures"].get(c, "")) for c in columns)]) + " |")
        out.append("")
    return "\n".join(out)


def free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def median_ms(work: Callable[[], object], repeats: int = 10, warmup: int = 3) -> float:
    """Median milliseconds by device events; Python's own time between launches counts where the device waits for it."""
    for _ in range(warmup):
        work()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def copy_tb_s() -> float:
    """Device copy of 2 GB, bytes read plus bytes written."""
    x = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    return 2 * x.nbytes / median_ms(lambda: y.copy_(x)) / 1e9


def bf16_tflop_s(n: int = 8192) -> float:
    """n x n x n product of random bf16 matrices."""
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / median_ms(lambda: a @ b, repeats=20) / 1e9


def fp8_tflop_s(n: int = 8192) -> float:
    """The same in E4M3 with one scale per matrix, bf16 out, in the faster of the two ways to accumulate."""
    a, b = (torch.randn(n, n, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")

    def multiply() -> torch.Tensor:  # the second matrix is column-major, as cuBLAS wants it
        return torch._scaled_mm(a, b.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return 2 * n**3 / median_ms(multiply, repeats=20) / 1e9


def ceilings() -> dict[str, float]:
    """What this card does at best, for the rows of the same run."""
    found = {"copy TB/s": copy_tb_s(), "bf16 TFLOP/s": bf16_tflop_s(), "FP8 TFLOP/s": fp8_tflop_s()}
    free_memory()
    return found


def spec_7b(num_layers: int, vocab_size: int = 152064, tied: bool = False):
    """Qwen2.5-7B's layers, as many as asked for."""
    from megatron_nft.policy.family import spec_from_config

    return spec_from_config(figures_7b(num_layers, vocab_size, tied))


def figures_7b(num_layers: int, vocab_size: int = 152064, tied: bool = False) -> dict:
    """config.json of a model of Qwen2.5-7B's shape."""
    return {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": vocab_size,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
    }


def training_flops(spec, lengths: list[int]) -> float:
    """Model FLOPs of forward and backward without recompute: 6 per weight and token, and causal attention.

    A sequence of n tokens has n^2 / 2 scores per head, each 2 x head size products in Q K^T and again in P V; the
    backward pass takes twice the forward's.
    """
    tokens = sum(lengths)
    q, kv = spec.num_attention_heads * spec.kv_channels, spec.num_query_groups * spec.kv_channels
    layer = spec.hidden_size * (2 * q + 2 * kv) + 3 * spec.hidden_size * spec.ffn_hidden_size
    weights = spec.num_layers * layer + spec.vocab_size * spec.hidden_size
    attention = spec.num_layers * sum(2 * q * n * n for n in lengths)
    return 6.0 * weights * tokens + 3.0 * attention
