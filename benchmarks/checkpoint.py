"""Checkpoints: the seconds that a step waits for one, and the bytes that a resume reads.

    python benchmarks/checkpoint.py [--megabytes 60] [--ranks 2] [--rounds 3]

Makes a random dense model, starts data-parallel ranks that train it in bf16, and saves in three ways, one after the
other in every round, so that all of them meet the same disk and the same load:

- `gathered`, what versions up to 0.1.0 did: megatron-core gathers a replica's optimizer state on every rank, torch's
  writer stores it, and every file is read again for its SHA-256;
- `own part`, `checkpoint.asynchronous=false`: every rank writes its part and hashes it on the way;
- `beside`, `checkpoint.asynchronous=true`: the step waits for copies in host memory; `whole` counts until the
  checkpoint has its name.

Then a `gathered` checkpoint is verified and loaded as it was, and one of ours by `CheckpointStore.restore`. Bytes are
what the ranks' read calls returned (`rchar` of /proc/self/io). Writes benchmarks/results/checkpoint.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from weight_sync import make_model

RESULT = Path(__file__).resolve().parent / "results" / "checkpoint.md"
TARGET = 0.2  # of the synchronous save

# --- one rank ---------------------------------------------------------------------------------------------------------


def run_rank(plan: dict) -> None:
    """Measure on this rank; rank 0 writes plan["figures"]."""
    import torch
    import torch.distributed as dist

    from megatron_nft.config import Config
    from megatron_nft.distributed import gather_objects
    from megatron_nft.policy import parallel
    from megatron_nft.policy.checkpoint import Saver, load_sharded
    from megatron_nft.policy.family import read_family
    from megatron_nft.policy.policy import Policy
    from megatron_nft.train.checkpoints import CheckpointStore, RunState
    from megatron_nft.weights.import_hf import load_hf

    config = Config.model_validate(
        {"run_dir": plan["run_dir"], "model": {"path": plan["model"]}, "data": {"train": ["unused"]}}
    )
    warnings.simplefilter("ignore")  # of what torch's writer says about the folder of the round before
    layout = parallel.initialize(config.policy, seed=0)
    torch.set_num_threads(1)
    spec, run_dir = read_family(config.model.path), Path(plan["run_dir"])
    policy = Policy.create(config, spec, layout)
    load_hf(policy.chunks, config.model.path, spec, layout)
    policy.reload_master_weights()
    identity = {"seed": 0, "model": spec.to_dict(), "data": "none", "layout": {"dp": layout.dp.size}}
    background = parallel.new_gloo_group(3600.0)
    at_once = CheckpointStore(run_dir, 1, identity, layout.world_gloo)
    beside = CheckpointStore(run_dir, 1, identity, layout.world_gloo, background)
    live, copies = Saver(policy, copies=False), Saver(policy, copies=True)

    def seconds(work: Callable[[], object]) -> float:
        """Of the slowest rank."""
        dist.barrier(group=layout.world_gloo)
        start = time.perf_counter()
        work()
        return max(gather_objects(time.perf_counter() - start, layout.world_gloo))

    def bytes_read(work: Callable[[], object]) -> int:
        """By all ranks together."""
        before = _rchar()
        work()
        return sum(gather_objects(_rchar() - before, layout.world_gloo))

    gathered = run_dir / "gathered"
    beside.save(RunState(1), copies.snapshot, [])  # touches the memory of the copies
    beside.wait()
    figures: dict = {"gathered": [], "own part": [], "beside": [], "whole": []}
    for number in range(plan["rounds"]):
        figures["gathered"].append(seconds(lambda: save_gathered(policy, gathered)))
        step = RunState(2 * number + 2)
        figures["own part"].append(seconds(lambda step=step: at_once.save(step, live.snapshot, [])))
        step = RunState(2 * number + 3)
        waited = seconds(lambda step=step: beside.save(step, copies.snapshot, []))
        figures["beside"].append(waited)
        figures["whole"].append(waited + seconds(beside.wait))

    def load(folder: Path, _: object) -> dict[str, str]:
        return {f"megatron/{name}": digest for name, digest in load_sharded(policy, folder / "megatron").items()}

    figures["stored"] = sum(path.stat().st_size for path in (run_dir / "checkpoints").rglob("*.distcp"))
    figures["bytes gathered"] = bytes_read(lambda: load_gathered(policy, gathered))
    figures["bytes ours"] = bytes_read(lambda: at_once.restore(load, print))
    if layout.rank == 0:
        Path(plan["figures"]).write_text(json.dumps(figures))
    parallel.shutdown()


def _rchar() -> int:
    """Bytes that this process has read so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def save_gathered(policy, folder: Path) -> None:
    """Megatron's fully reshardable format by its own gather, torch's writer, and a second reading for the hashes."""
    import torch
    import torch.distributed as dist
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
    from megatron.core.dist_checkpointing.strategies.torch import (
        MCoreSavePlanner,
        _replace_state_dict_keys_with_sharded_keys,
        mcore_to_pyt_state_dict,
    )
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    from megatron_nft.policy import cpu
    from megatron_nft.policy.checkpoint_state import without_classes

    group = policy.layout.world_gloo
    with cpu.on_cpu():
        sharded, common = save_preprocess(_gathered_state(policy, loading=False))
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
        if policy.layout.rank == 0:
            folder.mkdir(exist_ok=True)
            torch.save(without_classes(common), folder / "common.pt")
            save_config(CheckpointingConfig("torch_dist", 1), str(folder))
        dist.barrier(group=group)
        save(
            mcore_to_pyt_state_dict(by_key, False),
            storage_writer=FileSystemWriter(folder, single_file_per_rank=True, thread_count=1),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            process_group=group,
        )
    _hash_share(policy, folder)


def load_gathered(policy, folder: Path) -> None:
    """Every file is read for its SHA-256, then every rank loads what it needs by megatron-core's loader."""
    from megatron.core import dist_checkpointing

    from megatron_nft.policy import cpu

    _hash_share(policy, folder)
    with cpu.on_cpu():
        loaded = dist_checkpointing.load(_gathered_state(policy, loading=True), str(folder))
        for i, chunk in enumerate(policy.chunks):
            chunk.load_state_dict(loaded[f"model{i}"])
        policy.optimizer.load_state_dict(loaded["optimizer"])


def _gathered_state(policy, *, loading: bool) -> dict:
    from megatron_nft.policy.checkpoint_optimizer import fill_adam_state
    from megatron_nft.policy.checkpoint_state import CONTENT, sharded_models

    fill_adam_state(policy)
    models = sharded_models(policy)
    optimizer = policy.optimizer.sharded_state_dict(models, is_loading=loading, metadata=dict(CONTENT))
    return {**models, "optimizer": optimizer}


def _hash_share(policy, folder: Path) -> None:
    import torch.distributed as dist

    from megatron_nft.files import flush_to_disk, sha256_of_file

    dist.barrier(group=policy.layout.world_gloo)
    for path in sorted(folder.iterdir())[policy.layout.rank :: policy.layout.world_size]:
        flush_to_disk(path)
        sha256_of_file(path)
    dist.barrier(group=policy.layout.world_gloo)


# --- the whole --------------------------------------------------------------------------------------------------------


def table(figures: dict) -> str:
    """Medians over rounds, and the bytes of the two resumes."""
    middle = {name: statistics.median(figures[name]) for name in ("gathered", "own part", "beside", "whole")}
    stored, share = figures["stored"], middle["beside"] / middle["own part"]
    return (
        "| save | the step waits, s | of `gathered` | of `own part` | whole after, s |\n|---|---|---|---|---|\n"
        + "".join(
            f"| {name} | {middle[name]:.2f} | {middle[name] / middle['gathered']:.0%} | "
            f"{middle[name] / middle['own part']:.0%} | {middle['whole' if name == 'beside' else name]:.2f} |\n"
            for name in ("gathered", "own part", "beside")
        )
        + f"\nTarget: `beside` at most {TARGET:.0%} of the synchronous save; it is {share:.1%}.\n\n"
        "| resume | bytes read, MB | times what is stored |\n|---|---|---|\n"
        + "".join(
            f"| {name} | {figures[f'bytes {name}'] / 1e6:.0f} | {figures[f'bytes {name}'] / stored:.2f} |\n"
            for name in ("gathered", "ours")
        )
        + "\nTarget: every byte once.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=60, help="size of the model's bf16 weights (default 60)")
    parser.add_argument("--ranks", type=int, default=2, help="data-parallel ranks (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="saves of each kind (default 3)")
    parser.add_argument("--rank-plan", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_plan:
        run_rank(json.loads(args.rank_plan))
        return
    from megatron_nft.train.launch import start_local

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        make_model(scratch / "model", args.megabytes, "bfloat16")
        plan = {"model": str(scratch / "model"), "run_dir": str(scratch / "run"), "rounds": args.rounds}
        plan["figures"] = str(scratch / "figures.json")
        (scratch / "run").mkdir()
        if start_local([sys.executable, __file__, "--rank-plan", json.dumps(plan)], args.ranks) != 0:
            raise SystemExit("the ranks failed")
        figures = json.loads(Path(plan["figures"]).read_text())
    text = (
        f"# Checkpoints\n\n{figures['stored'] / 1e6:.0f} MB of weights (bf16) and optimizer state, {args.ranks} "
        f"data-parallel ranks, medians of {args.rounds}; {datetime.date.today()}, {platform.machine()}, "
        f"{os.cpu_count()} cores under a load of {os.getloadavg()[1]:.1f}, Python {platform.python_version()}. "
        "`python benchmarks/checkpoint.py`\n\n" + table(figures)
    )
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
