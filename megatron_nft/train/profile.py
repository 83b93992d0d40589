"""Profiles of chosen steps on chosen ranks: traces, ranges for Nsight Systems, snapshots of the GPU's memory.

What is written lies in run_dir/profile, one file per step and rank; docs/profiling.md says how each is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch

from megatron_nft.config.training import TrainConfig

MAX_MEMORY_EVENTS = 200_000  # allocations and frees kept of a step, the latest ones


class Profiler:
    """This rank's profiles, by `train.profile`."""

    def __init__(self, settings: TrainConfig, run_dir: Path, rank: int, device: torch.device) -> None:
        """ValueError where the tool needs a GPU and there is none."""
        self._tool = settings.profile if rank in settings.profile_ranks else None
        self._steps = frozenset(settings.profile_steps)
        self._folder, self._rank, self._device = run_dir / "profile", rank, device
        self._active = False
        if settings.profile in ("nsys", "memory") and device.type != "cuda":
            raise ValueError(
                f"train.profile={settings.profile} needs a GPU, and this run is on the {device.type}: "
                "use train.profile=torch here"
            )

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Run training step `number`, and profile it if it was chosen. A step that fails leaves no file."""
        if self._tool is None or number not in self._steps:
            yield
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        name = self._folder / f"step_{number:06d}_rank_{self._rank:05d}"
        self._active = True
        try:
            with {"torch": self._trace, "nsys": self._nsys, "memory": self._memory}[self._tool](name):
                yield
        finally:
            self._active = False

    def mark(self, phase: str) -> AbstractContextManager[None]:
        """Give a phase of the step its name in the profile."""
        if not self._active:
            return nullcontext()
        if self._tool == "nsys":
            return torch.cuda.nvtx.range(phase)
        return torch.profiler.record_function(phase)

    @contextmanager
    def _trace(self, name: Path) -> Iterator[None]:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profile:
            yield
        profile.export_chrome_trace(f"{name}.trace.json.gz")

    @contextmanager
    def _nsys(self, name: Path) -> Iterator[None]:
        """Nsight Systems writes the file; it records between these two calls (--capture-range=cudaProfilerApi)."""
        torch.cuda.synchronize(self._device)
        torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
        try:
            yield
            torch.cuda.synchronize(self._device)
        finally:
            torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]

    @contextmanager
    def _memory(self, name: Path) -> Iterator[None]:
        torch.cuda.memory._record_memory_history(max_entries=MAX_MEMORY_EVENTS)  # torch's documented way
        try:
            yield
            torch.cuda.memory._dump_snapshot(f"{name}.memory.pickle")  # type: ignore[no-untyped-call]
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)
