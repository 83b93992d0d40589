"""What a weight sync did, written to the run folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_nft.files import write_atomically


@dataclass(frozen=True, slots=True)
class Receipt:
    """A sync that was checked. One that failed or could not be checked has no receipt."""

    version: int
    transport: str  # in-process | tensor | distributed | disk
    engines: list[str]  # those that have the version now
    behind: dict[str, str]  # engine -> why it was lost, and does not have it
    nbytes: int  # of the weights, once
    seconds: dict[str, float]  # per phase, the slowest rank's
    checksums: dict[str, str]  # of the trainer's tensors, under HF names or, where it can tell, the engine's
    engine_checked: int  # checksums of engines, over all engines and their ranks, that agreed with these
    probe_difference: float | None  # largest |log-prob difference| between trainer and engines; None without a probe

    def metrics(self) -> dict[str, float]:
        """Return what the run logs: seconds per phase, bytes, number of lost engines, the probe's difference."""
        values = {f"{phase}_s": seconds for phase, seconds in self.seconds.items()}
        values |= {"bytes": float(self.nbytes), "engines_behind": float(len(self.behind))}
        if self.probe_difference is not None:
            values["probe_difference"] = self.probe_difference
        return values

    def write(self, run_dir: Path, *, again: bool = False) -> Path:
        """Write the receipt to run_dir/sync/, as version_000012.json for version 12; return the file's path.

        again: of a sync into engines that missed the first one of this version: version_000012_again_1.json, and so on.
        """
        folder, name = run_dir / "sync", f"version_{self.version:06d}"
        if again:
            name += f"_again_{1 + sum(1 for _ in folder.glob(f'{name}_again_*.json'))}"
        path = folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(self), indent=1) + "\n")
        return path
