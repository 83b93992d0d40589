"""The doctor's deep check of an engine: a real server on a tiny model of the same kind, and one that cannot start."""

from __future__ import annotations

import pytest

from megatron_nft.config import Config
from megatron_nft.plan.doctor.deep import engine_answers, transformer_engine_layer


def settings(model, rollout, folder, **server) -> Config:
    return Config(
        run_dir=folder / "run",
        model={"path": model},
        data={"train": [folder / "q"]},
        policy={"precision": "fp32"},
        rollout=rollout.model_copy(update={"server": rollout.server.model_copy(update=server)}),
    )


@pytest.mark.long
def test_a_server_that_answers(sglang_model, sglang_rollout, tmp_path):
    assert engine_answers(settings(sglang_model, sglang_rollout, tmp_path), tmp_path / "deep", "cpu", 500) == ""


def test_a_server_that_cannot_start(sglang_model, sglang_rollout, tmp_path):
    """The line names the server and has what it wrote last."""
    config = settings(sglang_model, sglang_rollout, tmp_path, extra_args=["--no-such-argument"])
    problem = engine_answers(config, tmp_path / "deep", "cpu", 300)
    assert "sglang server 0 on " in problem and "ended with exit code 2 before it answered" in problem
    assert "unrecognized arguments: --no-such-argument" in problem and "\n" not in problem
    nothing = engine_answers(settings(tmp_path / "none", sglang_rollout, tmp_path), tmp_path / "deep", "cpu")
    assert nothing.startswith(f"no model of the kind of {tmp_path}/none can be made: ")


def test_a_machine_without_transformer_engine():
    pytest.importorskip("torch")
    import importlib.util

    if importlib.util.find_spec("transformer_engine") is not None:
        pytest.skip("Transformer Engine is installed here; tests/gpu runs the layer")
    assert transformer_engine_layer(300) == "ModuleNotFoundError: No module named 'transformer_engine'"
    assert transformer_engine_layer(0.01) == "did not end within 0 s"
