"""Which Adam is in use, in words; offloading the optimizer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_nft.config import Config, OptimizerConfig, PolicyConfig
from megatron_nft.policy import optimizer as module
from megatron_nft.policy.optimizer import describe, megatron_config


def megatron_optimizer(inner: object, sharded: bool = True) -> SimpleNamespace:
    part = SimpleNamespace(optimizer=inner, config=SimpleNamespace(use_distributed_optimizer=sharded))
    return SimpleNamespace(chained_optimizers=[part, part])


def adam_of(package: str) -> type:
    return type("FusedAdam", (), {"__module__": f"{package}.optimizers.fused_adam"})


@pytest.mark.parametrize(
    ("package", "named"),
    [
        ("transformer_engine.pytorch", "Transformer Engine's fused Adam"),
        ("apex", "apex's fused Adam"),
        ("elsewhere", "elsewhere.optimizers.fused_adam.FusedAdam"),
    ],
)
def test_the_adam_in_use_is_named(package, named):
    inner = adam_of(package)()
    assert describe(megatron_optimizer(inner)) == f"{named}, sharded over data-parallel ranks"
    assert describe(megatron_optimizer(inner, sharded=False)) == named


def test_torch_and_the_host_are_named(monkeypatch):
    parameter = torch.nn.Parameter(torch.zeros(1))
    assert describe(megatron_optimizer(torch.optim.AdamW([parameter]), False)) == "torch's AdamW"

    class Offloaded:
        cpu_optimizer_cls = torch.optim.AdamW

    monkeypatch.setattr(module, "HybridDeviceOptimizer", Offloaded)
    expected = "torch's AdamW on the host, transfers overlapped, sharded over data-parallel ranks"
    assert describe(megatron_optimizer(Offloaded())) == expected


def test_offloading_keeps_the_only_masters_on_the_host_and_overlaps(monkeypatch):
    monkeypatch.setattr("megatron.core.optimizer.optimizer_config.is_te_min_version", lambda version: True)
    on = megatron_config(OptimizerConfig(), PolicyConfig(optimizer_offload=True))
    assert (on.optimizer_cpu_offload, on.optimizer_offload_fraction) == (True, 1.0)
    assert on.overlap_cpu_optimizer_d2h_h2d is True
    # without it DistributedOptimizer hands fp32 shards on the device to the host optimizer, which then never sees
    # weights that are loaded after it was built
    assert on.use_precision_aware_optimizer_no_fp8_or_ds_fp8 is True
    off = megatron_config(OptimizerConfig(), PolicyConfig())
    assert (off.optimizer_cpu_offload, off.use_precision_aware_optimizer_no_fp8_or_ds_fp8) == (False, False)


def test_offloading_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    config = Config.model_validate(
        {
            "run_dir": "x",
            "model": {"path": "x"},
            "data": {"train": ["x"]},
            "policy": {"optimizer_offload": True},
        }
    )
    with pytest.raises(ValueError, match="optimizer_offload=true needs a GPU"):
        module.build_optimizer([], config, 1)
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="optimizer_offload=true needs Transformer Engine"):
        module.build_optimizer([], config, 1)
