"""Training runs on hosts of the rig: started, stopped at one moment, and what is said of a host that is cut off."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml
from processes import wait_until
from rig import Host
from torchruns import TorchRun

from megatron_nft.train.whereabouts import Board

OURS = ("-m", "megatron_nft")
LIMIT_S = 60.0  # train.heartbeat_timeout_s, by default
TARGET_S = 120.0  # from the loss of a host to the end of the run, with the default settings


def start_training(
    hosts: Sequence[Host], ranks: int, settings: dict, program: Sequence[str | Path] = OURS, **env: str
) -> TorchRun:
    """`ranks` ranks on each host; their output is in the run folder."""
    run_dir = Path(settings["run_dir"])
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "given.yaml").write_text(yaml.safe_dump(settings))
    command = (*program, "train", "--config", run_dir / "given.yaml")
    return TorchRun(hosts, ranks, run_dir / "output", *command, env=env)


def halted(hosts: Sequence[Host], settings: dict, moment: str, mark: Path, timeout_s: float = 600.0) -> TorchRun:
    """A run of which every rank has come to this moment of step 2, and says so; the checkpoint of step 1 is whole.

    Each host has one rank. They go on when there is a file MARK-go.
    """
    run = start_training(hosts, 1, settings, NFT_TEST_HALT=f"2 {moment} {mark}")
    folder, ranks = Path(settings["run_dir"]), range(len(hosts))
    awaited = [*(Path(f"{mark}-{rank}") for rank in ranks), folder / "checkpoints/step_000001"]
    wait_until(lambda: run.ended or all(path.exists() for path in awaited), timeout_s, "the moment")
    board = Board(folder, 0, len(hosts), 5.0)
    wait_until(lambda: run.ended or all(r is not None and r.step >= 2 for r in board.read()), timeout_s, "their files")
    assert not run.ended, run.text
    return run


def check_each_misses_the_other(run: TorchRun, at: str) -> None:
    """The last line of each of two hosts names itself, `at` ("step 2, phase train"), and the other host's rank."""
    for rank, host in enumerate(run.hosts):
        said, other = run.last_line(host), run.hosts[1 - rank]
        assert said.startswith(f"megatron-nft: rank {rank} on {host.name}, {at}"), run.text
        silent = f"rank {1 - rank} on {other.name} has not been heard from for"
        assert f"lost the connection to another rank, {silent}" in said
        assert said.endswith(f"(limit {LIMIT_S:g} s, train.heartbeat_timeout_s)")
