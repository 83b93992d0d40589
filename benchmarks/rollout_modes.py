"""Trained tokens per second of each rollout.mode, with a real trainer and a server that only waits, or a real one.

    python benchmarks/rollout_modes.py [--server waiting|sglang] [--workload benchmarks/rollout_modes.json]
                                       [--repetitions N] [--out DIR]

The workload stands in one file and is the same for all modes: questions, answers and lengths (log-normal, the 7B run's
mean and longest answer divided by 37). A tenth of the answers is right, so that about a third of the groups can be
trained, as in the published geometry of 1536 questions for 512. `plan` are the seconds of the 7B run that
`megatron-nft plan` gives (its command is in the file); one factor scales them: that with which training takes what this
trainer is measured to take for a step without generation. A token of the server then takes as long as makes generation
in a synchronous step take its scaled seconds. A second table has other ratios of generation to training.

With `--server sglang` real answers come from one SGLang server on this machine, of random weights, a few of whose
tokens end an answer: its time is what it is.

A repetition runs all modes in turn, each for `warm_up` steps, which are left out, and then `steps` steps. Its rows are
written to rows.jsonl in OUT (default benchmarks/results/rollout_modes) when it is done, and the same command goes on
after the last one. Only rows of one digest of code and workload are pooled. Writes rollout_modes.md there too.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from arms import ROOT, add_seed, origin

from megatron_nft.data.synthetic import write_model, write_task
from megatron_nft.processes import free_port

HERE = Path(__file__).resolve().parent
MODES = ("synchronous", "streaming", "overlapped")
TARGETS = {"streaming": 1.3, "overlapped": 1.7}  # of synchronous
SHORT_TOKEN_S, LONG_TOKEN_S = 1e-4, 0.02  # of the two runs that tell tokens from generation's other costs
TIMED = ("waiting_engine.py", "rollout_modes.py", "../megatron_nft/plan/decoding.py")  # beside what trains


@dataclass
class Bench:
    """Runs of one workload in front of one kind of server."""

    folder: Path
    work: dict[str, Any]
    server: str  # waiting | sglang
    urls: list[str] = field(default_factory=list)  # of the real server

    def prepare(self, closing: ExitStack) -> None:
        """Questions, model and, where it is a real one, the server."""
        write_task(self.folder / "start" / "task", num_train=2000, num_held_out=1)
        write_model(self.folder / "start" / "model")
        if self.server == "sglang":
            self.urls = closing.enter_context(real_server(self.folder))

    def run(self, name: str, mode: str, seed: int, token_s: float = 0.0) -> dict[str, float]:
        """Figures of one run. RuntimeError, with its last lines, where it fails."""
        folder = self.folder / name
        folder.mkdir()
        with ExitStack() as closing:
            urls = self.urls or [closing.enter_context(waiting_server(folder, self.work, token_s, seed))]
            (folder / "config.yaml").write_text(yaml.safe_dump(self.settings(folder / "run", mode, seed, urls)))
            command = [sys.executable, "-m", "megatron_nft", "train", "--config", str(folder / "config.yaml")]
            path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
            env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
            with (folder / "log").open("w") as log:
                done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=env, check=False)
        if done.returncode:
            raise RuntimeError(f"{name}: exit status {done.returncode}:\n{(folder / 'log').read_text()[-3000:]}")
        rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        return figures(rows[1 + self.work["warm_up"] :])

    def settings(self, run_dir: Path, mode: str, seed: int, urls: list[str]) -> dict[str, Any]:
        """Of `megatron-nft train`."""
        work, start = self.work, self.folder / "start"
        rollout = {
            "engine": "sglang",
            "mode": mode,
            "max_staleness": 0 if mode == "synchronous" else work["max_staleness"],
            "questions_per_batch": work["questions_per_batch"],
            "answers_per_question": work["answers_per_question"],
            "max_response_tokens": work["max_tokens"],
            "server": {"urls": urls},
        }
        if self.server == "waiting":
            sync: dict[str, Any] = {"transport": "disk", "probe_tolerance": 1e9}
        else:
            sync, rollout["stop_token_ids"] = {}, work["stop_token_ids"]
        return {
            "run_dir": str(run_dir),
            "seed": seed,
            "num_processes": 2,
            "model": {"path": str(start / "model")},
            "policy": {"tensor_model_parallel_size": 2, "precision": "fp32", "micro_batch_tokens": 2048},
            "algorithm": {"loss_divisor": "tokens"},
            "data": {"train": [str(start / "task" / "train.jsonl")], "max_prompt_tokens": 16},
            "rollout": rollout,
            "sync": sync,
            "verify": {"grader": "waiting_engine.grade_few"},
            "train": {
                "num_steps": work["warm_up"] + work["steps"],
                "questions_per_step": work["questions_per_step"],
                "questions_per_optimizer_step": work["questions_per_step"] // 2,
            },
            "checkpoint": {"every_steps": 10**6, "export_hf": False},
            "metrics": {"tensorboard": False},
        }

    def calibrate(self) -> dict[str, float]:
        """What this trainer and this machine take beside the tokens, in seconds of a synchronous step."""
        short = self.run("calibrate-short", "synchronous", 0, SHORT_TOKEN_S)
        long = self.run("calibrate-long", "synchronous", 0, LONG_TOKEN_S)
        return {
            "training_s": short["step_s"] - short["generate_s"],
            "generation_s": short["generate_s"],  # with next to no time for tokens
            "tokens": (long["generate_s"] - short["generate_s"]) / (LONG_TOKEN_S - SHORT_TOKEN_S),
        }

    def repeat(self, ratio: float | None, repetition: int, token_s: float) -> list[dict[str, Any]]:
        """The rows of a repetition."""
        name = f"{ratio}-{repetition}"
        made = {mode: self.run(f"{name}-{mode}", mode, repetition + 1, token_s) for mode in MODES}
        facts = {"ratio": ratio, "repetition": repetition, "token_s": token_s}
        return [{"mode": mode, **facts, **found} for mode, found in made.items()]


@contextmanager
def waiting_server(folder: Path, work: dict[str, Any], token_s: float, seed: int) -> Iterator[str]:
    """The URL of a server that only waits."""
    engine = {name: work[name] for name in ("mean_tokens", "max_tokens", "spread", "max_rows")} | {"seed": seed}
    engine |= dict.fromkeys(("context_s", "row_s", "overhead_s", "prefill_s"), 0.0) | {"weights_s": token_s}
    (folder / "engine.json").write_text(json.dumps(engine))
    port = free_port()
    command = [sys.executable, str(HERE / "waiting_engine.py"), "--port", str(port)]
    server = subprocess.Popen([*command, "--settings", str(folder / "engine.json")], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None and server.stdout.readline() == "ready\n", "the server did not start"
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@contextmanager
def real_server(folder: Path) -> Iterator[list[str]]:
    """The URL of an SGLang server on this machine. Each run brings it its weights."""
    from megatron_nft.config import RolloutConfig
    from megatron_nft.engines.engine import NO_WEIGHTS
    from megatron_nft.engines.sglang.kind import KIND
    from megatron_nft.engines.start import start_servers

    rollout = RolloutConfig(engine="sglang", server={"max_total_tokens": 32768, "max_running_requests": 64})
    options = {"precision": "fp32", "device": "cpu", "log_dir": folder, "weight_version": NO_WEIGHTS}
    group = start_servers(KIND, folder / "start" / "model", rollout, **options)
    try:
        yield group.urls
    finally:
        group.close()


def figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of the rows of metrics.jsonl of some steps."""
    total = sum(row["seconds/total"] for row in rows)
    return {
        "tokens_per_s": sum(row["tokens/trained"] for row in rows) / total,
        "groups": sum(row["groups/kept"] for row in rows),
        "step_s": total / len(rows),
        "generate_s": sum(row["seconds/generate"] for row in rows) / len(rows),
        "age": float(np.mean([row["age/mean"] for row in rows])),
    }


def token_seconds(calibration: dict[str, float], ratio: float) -> float:
    """Seconds of a token with which a synchronous step generates `ratio` times as long as it trains."""
    lacking = ratio * calibration["training_s"] - calibration["generation_s"]
    return max(SHORT_TOKEN_S, SHORT_TOKEN_S + lacking / calibration["tokens"])


def plan_ratio(work: dict[str, Any]) -> float:
    """Generation to training of the 7B run, as plan has it."""
    return float(work["plan"]["generation_s"] / work["plan"]["training_s"])


def digest_of(workload: Path) -> str:
    """Of the code that trains, of what takes the time, and of the workload."""
    digest = hashlib.sha256(origin(())["digest"].encode())
    for path in (workload, *(HERE / name for name in TIMED)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def read_rows(path: Path, server: str, digest: str) -> list[dict[str, Any]]:
    """Rows of one kind of server and one digest."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [row for row in map(json.loads, lines) if (row["server"], row["digest"]) == (server, digest)]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: means over repetitions, and the speed-up with its smallest and largest."""
    lines = [
        "| mode | trained tokens/s | of synchronous | target | step s | generate s | mean age |",
        "|---|---|---|---|---|---|---|",
    ]
    of_mode = {mode: sorted((r for r in rows if r["mode"] == mode), key=lambda r: r["repetition"]) for mode in MODES}
    base = [row["tokens_per_s"] for row in of_mode["synchronous"]]
    for mode, found in of_mode.items():
        mean = {name: float(np.mean([row[name] for row in found])) for name in ("step_s", "generate_s", "age")}
        rate = float(np.mean([row["tokens_per_s"] for row in found]))
        ratios = [row["tokens_per_s"] / b for row, b in zip(found, base, strict=True)]
        spread = f"{np.mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        target = f"{TARGETS[mode]:g}" if mode in TARGETS else ""
        cells = (mode, f"{rate:.0f}", spread, target, f"{mean['step_s']:.2f}", f"{mean['generate_s']:.2f}")
        lines.append(f"| {' | '.join(cells)} | {mean['age']:.2f} |")
    return lines


def report(rows: list[dict[str, Any]], work: dict[str, Any], server: str) -> list[str]:
    """Markdown of all repetitions of one kind of server."""
    if server == "sglang":
        return ["## A real SGLang server on the same cores", "", *table(rows), ""]
    (calibration,) = (row for row in rows if "training_s" in row)
    factor = calibration["training_s"] / work["plan"]["training_s"]
    lines = [
        "## A server that only waits",
        "",
        f"A step without generation takes {calibration['training_s']:.2f} s: {factor:.4f} of the 7B run's "
        f"{work['plan']['training_s']:g} s. Its generation of {work['plan']['generation_s']:g} s, scaled alike:",
        "",
    ]
    runs: dict[float, list[dict[str, Any]]] = {}
    for row in rows:
        if "mode" in row:
            runs.setdefault(row["ratio"], []).append(row)
    main_ratio = plan_ratio(work)
    for ratio in [main_ratio, *(r for r in work["ratios"] if r != main_ratio)]:
        if ratio in runs:
            title = [] if ratio == main_ratio else [f"Generation : training = {ratio:g} : 1", ""]
            repetitions = len({row["repetition"] for row in runs[ratio]})
            token = f"{runs[ratio][0]['token_s'] * 1000:.1f} ms a token"
            lines += [*title, *table(runs[ratio]), "", f"{repetitions} repetitions, {token}.", ""]
    return lines


def measure(bench: Bench, path: Path, facts: dict[str, Any], repetitions: int | None) -> None:
    """Make the repetitions that the file lacks."""
    work, have = bench.work, read_rows(path, bench.server, facts["digest"])
    wanted: list[tuple[float | None, int]] = [(None, repetitions or work["repetitions"])]
    calibration = None
    if bench.server == "waiting":
        calibration = next((row for row in have if "training_s" in row), None)
        wanted = [(plan_ratio(work), repetitions or work["repetitions"])]
        wanted += [(ratio, repetitions or work["ratio_repetitions"]) for ratio in work["ratios"]]
    made = {(row["ratio"], row["repetition"]) for row in have if "mode" in row}
    todo = [(ratio, r) for ratio, count in wanted for r in range(count) if (ratio, r) not in made]
    if not todo:
        return
    with ExitStack() as closing:
        bench.prepare(closing)
        if bench.server == "waiting" and calibration is None:
            calibration = bench.calibrate()
            add_seed(path, [facts | calibration])
        for ratio, repetition in todo:
            token_s = 0.0 if ratio is None or calibration is None else token_seconds(calibration, ratio)
            rows = bench.repeat(ratio, repetition, token_s)
            add_seed(path, [facts | row for row in rows])
            for row in rows:
                shown = {name: round(row[name], 3) for name in ("tokens_per_s", "step_s", "generate_s", "age")}
                print(f"ratio {ratio}, repetition {repetition}, {row['mode']}: {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", choices=("waiting", "sglang"), default="waiting")
    parser.add_argument("--workload", type=Path, default=HERE / "rollout_modes.json")
    parser.add_argument("--repetitions", type=int, help="default: the workload's")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "rollout_modes")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    work, path, digest = json.loads(args.workload.read_text()), args.out / "rows.jsonl", digest_of(args.workload)
    with tempfile.TemporaryDirectory() as scratch:
        facts = {**origin(()), "digest": digest, "server": args.server}
        measure(Bench(Path(scratch), work, args.server), path, facts, args.repetitions)
    lines = [f"# Modes of the rollouts\n\n{datetime.date.today()}, code {digest}, {facts['machine']}.\n"]
    for server in ("waiting", "sglang"):
        if rows := read_rows(path, server, digest):
            lines += report(rows, work, server)
    (args.out / "rollout_modes.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
