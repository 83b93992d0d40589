"""CUDA_DEVICE_MAX_CONNECTIONS by chip, layout, settings and environment; nvidia-smi is a script."""

import os

import pytest

from megatron_nft.config import PolicyConfig
from megatron_nft.policy.connections import VARIABLE, set_connections
from megatron_nft.processes import clean_environment

TP = {"tensor_model_parallel_size": 2}


@pytest.fixture
def chips(tmp_path, monkeypatch):
    """Sets the compute capabilities that the driver's tool tells."""

    def install(*capabilities: str) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text("#!/bin/sh\n" + "".join(f"echo {c}\n" for c in capabilities))
        tool.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(VARIABLE, "")  # so that it is put back afterwards
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv(f"NFT_BEFORE_{VARIABLE}", "")
    monkeypatch.delenv(f"NFT_BEFORE_{VARIABLE}")
    return install


@pytest.mark.parametrize(
    ("capabilities", "settings", "environment", "expected"),
    [
        (["9.0", "9.0"], TP, None, "1"),
        (["9.0"], {"context_parallel_size": 2}, None, "1"),
        (["9.0"], {}, None, None),
        (["9.0"], {}, "8", "8"),
        (["9.0"], TP, "1", "1"),
        (["10.0", "9.0"], TP, None, "1"),
        (["10.0"], TP, None, None),
        (["10.0"], TP, "8", "8"),
        (["10.0"], TP | {"cuda_device_max_connections": 4}, "8", "4"),
        (["9.0"], {"cuda_device_max_connections": 1}, None, "1"),
        (["9.0"], TP | {"cuda_device_max_connections": 1}, "8", "1"),
        ([], TP, None, None),
    ],
)
def test_what_ranks_get(chips, monkeypatch, capabilities, settings, environment, expected):
    if capabilities:
        chips(*capabilities)
    if environment is not None:
        monkeypatch.setenv(VARIABLE, environment)
    set_connections(PolicyConfig(**settings))
    assert os.environ.get(VARIABLE) == expected
    assert clean_environment().get(VARIABLE) == environment  # that of servers


@pytest.mark.parametrize(
    ("settings", "environment", "source"),
    [
        (TP, "8", "by the environment"),
        (TP | {"cuda_device_max_connections": 8}, None, r"by policy\.cuda_device_max_connections"),
    ],
)
def test_what_would_not_overlap_is_refused(chips, monkeypatch, settings, environment, source):
    chips("9.0")
    if environment is not None:
        monkeypatch.setenv(VARIABLE, environment)
    with pytest.raises(ValueError, match=f"is 8 {source}.*needs 1"):
        set_connections(PolicyConfig(**settings))
