"""Runs the tests and measurements of one GPU in the order of their worth, within the minutes that there are.

    bash benchmarks/gpu.sh [--minutes N] [PART …]        (it sets the environment up and calls this)

Without PART everything that is missing; what is named runs again. A part is done when it ended well: OUT/done.json says
so, and rows are in OUT/results.jsonl, so that the next call goes on where this one stopped.
Parts side by side are test files, which each need little of the GPU; all others have it to themselves. Before the first
part that needs it, Transformer Engine and SGLang are started once for nothing: where that fails, the parts that need
it are left out with the reason, and cost none of their time. A part is not begun with less time left than it takes to
show anything, and is ended at the limit; its rows so far are kept.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
CHECK_S = 90.0  # a first import of Transformer Engine takes half a minute
END_S = 5.0  # to write the tables and leave
NO_LIMIT_S = 480.0  # of a part, where no minutes are given

TRAINING_CHECK = """
import torch, transformer_engine.pytorch as te
x = torch.ones(16, 64, device="cuda", dtype=torch.bfloat16)
te.Linear(64, 64, params_dtype=torch.bfloat16)(x).sum().item()
torch.backends.cudnn.version()
"""
ENGINE_CHECK = "import sglang.srt.entrypoints.http_server"


@dataclass(frozen=True, slots=True)
class Part:
    """One command. Parts of the same `together` that follow each other run side by side."""

    name: str
    needs: str  # "training" or "engine": what is tried once before; "": nothing
    least_s: float  # with less time left it is not begun
    command: tuple[str, ...]  # after the interpreter
    together: str = ""


def pytest_part(name: str, needs: str, least_s: float) -> Part:
    command = ("-m", "pytest", f"tests/gpu/test_gpu_{name}.py", "-p", "no:cacheprovider", "-q", "--durations=5")
    return Part(f"test_{name}", needs, least_s, command, together="tests" if needs == "training" else "")


def script(name: str, needs: str, least_s: float, *arguments: str) -> Part:
    return Part(name, needs, least_s, (f"benchmarks/gpu_{name}.py", *arguments))


PARTS = (  # in the order of worth
    script("ceilings", "", 20),
    *(
        pytest_part(name, "training", 60)
        for name in ("cudnn", "spec", "fp8", "logprobs", "optimizer", "checksum", "context")
    ),
    script("training", "training", 60),  # lm_head, train_step, packed_vs_padded, fp8_curve, graphs: one warm process
    script("engine", "engine", 90),  # weight_sync, generation and the memory of sleep cycles: one server
    pytest_part("engine", "engine", 100),
    script("agreement", "engine", 120),
    script("nft_run", "engine", 120),
    script("decoding", "engine", 100),
    pytest_part("vllm", "", 100),
)
PIECES = tuple(  # of `training`, to be named one by one
    Part(name, "training", 30, ("benchmarks/gpu_training.py", name))
    for name in ("lm_head", "train_step", "packed_vs_padded", "fp8_curve", "graphs")
)


class Session:
    """What one call runs."""

    def __init__(self, out: Path, seconds: float | None, python: str = sys.executable) -> None:
        """seconds: of this call; None gives each part NO_LIMIT_S."""
        self.out, self.python = out, python
        self._ends = None if seconds is None else time.monotonic() + seconds - END_S
        self._checks: dict[str, str] = {}  # "training" or "engine" -> why it cannot be had, "" where it can
        out.mkdir(parents=True, exist_ok=True)

    def seconds_left(self) -> float:
        """Until the limit of this call; NO_LIMIT_S for each part where there is none."""
        return NO_LIMIT_S if self._ends is None else self._ends - time.monotonic()

    def run(self, parts: Sequence[Part], checks: dict[str, Callable[[], list[str]]]) -> list[tuple[str, str]]:
        """Run parts in their order; returns (part, what became of it) for each.

        checks: what starts "training" and "engine" once, after the interpreter and with its environment.
        """
        said: list[tuple[str, str]] = []
        todo = list(parts)
        while todo:
            part = todo[0]
            batch = [p for p in todo if p.together and p.together == part.together] or [part]
            todo = [p for p in todo if p not in batch]
            reason = self._why_not(part, checks)
            if reason:
                said += [(p.name, f"left out: {reason}") for p in batch]
                continue
            if self.seconds_left() < part.least_s:
                said += [(p.name, f"not begun: {self.seconds_left():.0f} s left") for p in batch]
                continue
            said += self._side_by_side(batch)
        return said

    def _why_not(self, part: Part, checks: dict[str, Callable[[], list[str]]]) -> str:
        """Why what a part needs cannot be had, in one line; "" where it can. Tried once."""
        if not part.needs or part.needs not in checks:
            return ""
        if part.needs not in self._checks:
            limit = min(CHECK_S, max(1.0, self.seconds_left()))
            try:
                command = checks[part.needs]()
                done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False, cwd=ROOT)
                lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
                self._checks[part.needs] = "" if done.returncode == 0 else f"{part.needs} does not start: {lines[-1]}"
            except subprocess.TimeoutExpired:
                self._checks[part.needs] = f"{part.needs} did not start within {limit:.0f} s"
            except LookupError as e:
                self._checks[part.needs] = str(e)
        return self._checks[part.needs]

    def _side_by_side(self, parts: Sequence[Part]) -> list[tuple[str, str]]:
        """Run parts at the same time; ends them at the limit."""
        running = []
        begun = time.monotonic()
        for part in parts:
            log = self.out / f"{part.name}.log"
            with log.open("w") as file:
                process = subprocess.Popen(
                    [self.python, *part.command], stdout=file, stderr=file, cwd=ROOT, start_new_session=True
                )
            running.append((part, process, log))
        said = []
        for part, process, log in running:
            try:
                status: int | None = process.wait(timeout=max(1.0, self.seconds_left()))
            except subprocess.TimeoutExpired:
                status = None
            finally:
                end_group(process)
            seconds = f"{time.monotonic() - begun:.0f} s"
            if status == 0:
                self._note_done(part.name)
                said.append((part.name, f"done, {seconds}"))
            elif status is None:
                said.append((part.name, f"ended at the limit, {seconds}"))
            else:
                lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
                said.append((part.name, f"failed with {status}, {seconds}: {lines[-1]}"))
        return said

    def missing(self, parts: Sequence[Part]) -> list[Part]:
        """The parts that no call has done."""
        done = self._done()
        return [p for p in parts if p.name not in done]

    def _done(self) -> set[str]:
        path = self.out / "done.json"
        return set(json.loads(path.read_text())) if path.exists() else set()

    def _note_done(self, name: str) -> None:
        (self.out / "done.json").write_text(json.dumps(sorted(self._done() | {name})))


def end_group(process: subprocess.Popen) -> None:
    """End a process and all that it started, servers too."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signum)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + 10
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
    process.wait()


def training_check() -> list[str]:
    return [sys.executable, "-c", TRAINING_CHECK]


def engine_check() -> list[str]:
    """LookupError where SGLang is neither installed nor unpacked from its bundle."""
    found = os.environ.get("NFT_SGLANG_PYTHONPATH")
    if not found and importlib.util.find_spec("sglang") is None:
        raise LookupError("SGLang is not there yet: neither installed nor all parts of its bundle")
    return ["env", *([f"PYTHONPATH={found}"] if found else []), sys.executable, "-c", ENGINE_CHECK]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, help="of this call, all included; without it each part has 8")
    parser.add_argument("--spent-s", type=float, default=0.0, help=argparse.SUPPRESS)  # of them, before this began
    parser.add_argument("parts", nargs="*", metavar="PART")
    args = parser.parse_args()
    names = [p.name for p in (*PARTS, *PIECES)]
    if unknown := sorted(set(args.parts) - set(names)):
        parser.error(f"unknown part {', '.join(unknown)}; parts: {' '.join(names)}")
    seconds = None if args.minutes is None else 60 * args.minutes - args.spent_s
    session = Session(Path(os.environ.get("OUT", RESULTS)), seconds)
    chosen = [p for p in (*PARTS, *PIECES) if p.name in args.parts] if args.parts else session.missing(PARTS)
    said = session.run(chosen, {"training": training_check, "engine": engine_check})
    if not said:
        print(f"nothing is missing in {session.out}; name a part to run it again")
        return 0
    width = max(len(name) for name, _ in said)
    print("\n".join(f"{name:<{width}}  {what}" for name, what in said))
    return int(any(what.startswith(("failed", "left out")) for _, what in said))


if __name__ == "__main__":
    sys.exit(main())
