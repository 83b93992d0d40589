"""Context parallelism with Transformer Engine: its own split of packed tokens on one GPU, its attention on two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import make_model

from megatron_nft.policy.context_parallel import split_tokens

pytestmark = pytest.mark.needs("engine")


@pytest.mark.parametrize("size", [2, 3, 4])
def test_tokens_are_split_as_transformer_engine_splits_them(layout, size):
    import transformer_engine_torch as tex

    lengths = torch.tensor([2, 10, 4, 1, 33]) * 2 * size
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(layout.device, torch.int32)
    found = split_tokens(bounds, size)
    for rank in range(size):
        expected = tex.thd_get_partitioned_indices(bounds, int(bounds[-1]), size, rank)
        assert torch.equal(found[rank], expected.long()), rank


@pytest.mark.needs("two_gpus")
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_two_gpus_have_the_numbers_of_one(family, tmp_path):
    model = make_model(tmp_path / "model", family, tied=False, hidden=256, heads=4, kv_heads=2, layers=3, vocab=300)
    script = Path(__file__).with_name("ranks_gpu_context.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), model]
    path = os.pathsep.join([str(script.parent), str(script.parents[1] / "distributed"), str(script.parents[1])])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([path, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.count("as on one rank") == 2
