"""Converted and resharded checkpoints in Megatron's own hands."""

from __future__ import annotations

import json

import numpy as np
import torch
import torch.distributed as dist
from launch import Ranks, run_checks
from megatron.core import dist_checkpointing
from policies import enter_layout, first_logprobs, make_config, make_policy, step
from tiny import make_model

from megatron_nft.policy import cpu
from megatron_nft.policy.checkpoint import load_sharded, save_sharded
from megatron_nft.policy.family import read_family
from megatron_nft.policy.model import build_chunks
from megatron_nft.weights.hf_folder import HFFolder
from megatron_nft.weights.import_hf import load_hf
from megatron_nft.weights.offline.convert import hf_to_megatron, megatron_to_hf
from megatron_nft.weights.offline.diff import compare, compare_optimizers
from megatron_nft.weights.offline.megatron_reader import MegatronCheckpoint, MegatronWeights
from megatron_nft.weights.offline.megatron_writer import TargetLayout
from megatron_nft.weights.offline.reshard import reshard

VOCAB = 263  # TP 2 pads it
FAMILIES = (("qwen2", True), ("qwen3", False), ("llama", False), ("qwen3_moe", False))
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
VPP2 = PP2 | {"virtual_pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}


def model(ranks: Ranks, family: str, tied: bool):
    folder = ranks.scratch / f"{family}-{tied}"
    if ranks.rank == 0 and not folder.exists():
        make_model(folder, family, tied=tied, layers=4, ffn=96, vocab=VOCAB)
    dist.barrier()
    return folder


def on_first(ranks: Ranks, work) -> None:
    """Run `work` on rank 0 while the others wait."""
    if ranks.rank == 0:
        work()
    dist.barrier()


def check_megatron_loads_converted_checkpoints(ranks: Ranks) -> None:
    """dist_checkpointing.load of a checkpoint written for another layout gives what load_hf gives, bit for bit."""
    for family, tied in FAMILIES:
        source = model(ranks, family, tied)
        converted = ranks.scratch / f"converted-{family}"
        on_first(ranks, lambda source=source, out=converted: hf_to_megatron(source, out, TargetLayout(2, 2, 1)))
        spec = read_family(source)
        for policy in (TP2, VPP2, EP2) if spec.num_experts else (TP2, VPP2):
            config = make_config(source, **policy)
            layout = enter_layout(config)
            expected, chunks = (build_chunks(spec, config.policy, layout) for _ in range(2))
            load_hf(expected, source, spec, layout)
            with cpu.on_cpu():
                wanted = {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
                for entries in wanted.values():
                    for name in [name for name in entries if name.endswith("_extra_state")]:
                        del entries[name]
                loaded = dist_checkpointing.load(wanted, str(converted))
            for i, (chunk, other) in enumerate(zip(chunks, expected, strict=True)):
                chunk.load_state_dict(loaded[f"model{i}"])
                for (name, a), (_, b) in zip(chunk.named_parameters(), other.named_parameters(), strict=True):
                    assert torch.equal(a, b), (family, policy, name)


def check_training_checkpoint_to_hf(ranks: Ranks) -> None:
    """After two steps in TP2: the folder has the trained weights; --dtype fp32 of a bf16 run has the masters."""
    source = model(ranks, "qwen2", True)
    made = make_policy(source, precision="bf16", optimizer={"lr": 1e-2}, **TP2)
    step(made), step(made)
    save_sharded(made, ranks.scratch / "trained" / "megatron")
    folder = ranks.scratch / "trained"
    on_first(ranks, lambda: megatron_to_hf(folder, ranks.scratch / "hf-bf16", source))
    on_first(ranks, lambda: megatron_to_hf(folder, ranks.scratch / "hf-fp32", source, torch.float32))
    narrow, wide = HFFolder(ranks.scratch / "hf-bf16"), HFFolder(ranks.scratch / "hf-fp32")
    assert set(narrow.dtypes.values()) == {torch.bfloat16} and set(wide.dtypes.values()) == {torch.float32}
    assert all(torch.equal(wide.read(name).bfloat16(), narrow.read(name)) for name in wide.shapes)
    assert any(not torch.equal(wide.read(name), narrow.read(name).float()) for name in wide.shapes)
    fresh = make_policy(ranks.scratch / "hf-bf16", precision="bf16", **TP2)
    for a, b in zip(made.chunks[0].parameters(), fresh.chunks[0].parameters(), strict=True):
        assert torch.equal(a, b)


def check_expert_parallel_checkpoint_to_hf_and_reshard(ranks: Ranks) -> None:
    """Experts divided over two ranks: the folder and a resharded checkpoint hold every expert in its place."""
    source = model(ranks, "qwen3_moe", False)
    made = make_policy(source, optimizer={"lr": 1e-2}, **EP2)
    run = ranks.scratch / "experts"
    save_sharded(made, run / "megatron")
    manifest = {"model": read_architecture(source), "layout": {"tp": 1, "pp": 1, "dp": 2}}
    on_first(ranks, lambda: (run / "manifest.json").write_text(json.dumps(manifest)))
    on_first(ranks, lambda: megatron_to_hf(run, ranks.scratch / "hf-experts", source))
    assert all(row.same for row in compare(HFFolder(source), HFFolder(ranks.scratch / "hf-experts")))
    step(made)
    save_sharded(made, run / "megatron")
    on_first(ranks, lambda: reshard(run, ranks.scratch / "experts-pp2", TargetLayout(1, 2, 1)))
    sides = [MegatronCheckpoint(folder) for folder in (run, ranks.scratch / "experts-pp2")]
    assert all(row.same for row in compare_optimizers(*sides))
    before, after = (MegatronWeights(side, made.spec) for side in sides)
    assert all(row.same for row in compare(before, after))
    changed = {row.name for row in compare(HFFolder(source), after) if not row.same}
    assert sum(".mlp.experts." in name for name in changed) > 24, changed  # of 4 layers x 4 experts x 3


def check_resharded_training_goes_on_to_the_same_weights(ranks: Ranks) -> None:
    """TP2 or CP2 -> PP2 (and interleaved), and back: the step after the tool is the step that the old layout would have
    made."""
    for axis, policy in (("tp", TP2), ("cp", CP2)):
        compare_resharded(ranks, ranks.scratch / f"{axis}2", policy, {"tp": 1, "cp": 1, "pp": 1, "dp": 1} | {axis: 2})


def compare_resharded(ranks: Ranks, folder, before: dict, layout: dict) -> None:
    source = model(ranks, "qwen2", True)
    optimizer = {"lr": 1e-2, "lr_warmup_steps": 4}
    made = make_policy(source, optimizer=optimizer, **before)
    step(made), step(made)
    run = folder / "step_000002"
    save_sharded(made, run / "megatron")
    manifest = {"format": 1, "step": 2, "model": read_architecture(source), "layout": layout, "files": {}}
    on_first(ranks, lambda: (run / "manifest.json").write_text(json.dumps(manifest)))
    step(made)
    expected = first_logprobs(made)
    grids = ((PP2, TargetLayout(1, 2, 1)), (VPP2, TargetLayout(1, 2, 2)), (before, TargetLayout(layout["tp"], 1, 1)))
    for policy, grid in grids:
        out = folder / f"resharded-{grid.tp}-{grid.pp}-{grid.vpp}"
        on_first(ranks, lambda out=out, grid=grid: reshard(run, out, grid))
        told = json.loads((out / "manifest.json").read_text())
        assert told["layout"] == layout | {"tp": grid.tp, "pp": grid.pp} and told["step"] == 2
        on_disk = {str(p.relative_to(out)): p.stat().st_size for p in out.rglob("*") if p.is_file()}
        assert {n: f["bytes"] for n, f in told["files"].items()} | {"manifest.json": 0} == on_disk | {
            "manifest.json": 0
        }
        assert not any(key.startswith("rng.") for key in MegatronCheckpoint(out).shapes)
        assert all(row.same for row in compare_optimizers(MegatronCheckpoint(run), MegatronCheckpoint(out)))
        resumed = make_policy(source, load=False, optimizer=optimizer, **policy)
        load_sharded(resumed, out / "megatron")
        step(resumed)
        np.testing.assert_allclose(first_logprobs(resumed), expected, atol=2e-5, err_msg=str(grid))


def read_architecture(source) -> dict:
    return read_family(source).to_dict()


if __name__ == "__main__":
    run_checks(globals())
