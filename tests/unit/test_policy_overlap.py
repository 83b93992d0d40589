"""Settings that overlap communication: what they need, and what Transformer Engine's user buffers are asked for."""

import sys
import types
from enum import Enum
from types import SimpleNamespace

import pytest

from megatron_nft.config import PolicyConfig
from megatron_nft.policy import user_buffers

BUFFERS = {
    "tp_comm_overlap": True,
    "tensor_model_parallel_size": 4,
    "sequence_parallel": True,
    "micro_batch_tokens": 4096,
}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"overlap_param_gather": True}, "overlap_grad_reduce=true, not true and false"),
        (
            {"overlap_param_gather": True, "overlap_grad_reduce": True, "use_distributed_optimizer": False},
            "use_distributed_optimizer=true and overlap_grad_reduce=true, not false and true",
        ),
        (BUFFERS | {"sequence_parallel": False}, "needs sequence_parallel=true"),
        (BUFFERS | {"precision": "fp32"}, "precision=bf16"),
        (BUFFERS | {"layer_spec": "local"}, "layer_spec auto or transformer_engine"),
        (BUFFERS | {"fp8": {"recipe": "blockwise"}}, "no user buffers for fp8.recipe=blockwise"),
        (BUFFERS | {"micro_batch_tokens": 4098}, "must be a multiple of 4,"),
        (BUFFERS | {"micro_batch_tokens": 4000, "fp8": {"recipe": "delayed"}}, "must be a multiple of 64,"),
    ],
)
def test_what_cannot_work_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        PolicyConfig(**settings)


def test_micro_batches_have_the_size_of_the_buffers():
    assert PolicyConfig(**BUFFERS).token_multiple == 4096
    assert PolicyConfig(**BUFFERS | {"tp_comm_overlap": False}).token_multiple == 4


@pytest.fixture
def transformer_engine(monkeypatch):
    """A stand-in for transformer_engine.pytorch.module.base of 2.11, which remembers what it was asked for."""
    base = types.ModuleType("base")
    base.asked, base._ub_communicators = [], None
    base.UserBufferQuantizationMode = Enum("UserBufferQuantizationMode", {"NONE": "none", "FP8": "fp8"})

    def initialize_ub(**arguments):
        base.asked.append(arguments)
        base._ub_communicators = {}

    base.initialize_ub = initialize_ub
    names = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.module")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[names[-1]].base = base
    return base


def open_buffers(monkeypatch, hosts: list[str], **settings: object) -> None:
    monkeypatch.setattr(user_buffers, "gather_objects", lambda mine, group: hosts)
    layout = SimpleNamespace(world_gloo=None, tp=SimpleNamespace(size=4))
    user_buffers.open_user_buffers(SimpleNamespace(hidden_size=64), PolicyConfig(**BUFFERS, **settings), layout)


@pytest.mark.parametrize(("settings", "modes"), [({}, ["NONE"]), ({"fp8": {"recipe": "delayed"}}, ["FP8", "NONE"])])
def test_buffers_are_made_once(transformer_engine, monkeypatch, settings, modes):
    hosts = ["a"] * 4 + ["b"] * 4
    for _ in range(2):
        open_buffers(monkeypatch, hosts, **settings)
    (asked,) = transformer_engine.asked
    assert [mode.name for mode in asked.pop("quantization_modes")] == modes
    assert asked == {"shape": [4096, 64], "tp_size": 4, "bootstrap_backend": "gloo"}


def test_a_tensor_parallel_group_on_two_hosts_is_refused(transformer_engine, monkeypatch):
    with pytest.raises(ValueError, match="ranks 4 to 7 are on a, b"):
        open_buffers(monkeypatch, ["a"] * 6 + ["b"] * 2)
    assert not transformer_engine.asked
