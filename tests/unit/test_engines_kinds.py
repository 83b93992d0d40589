"""The table of engines, and what each engine's record says."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import get_args

import pytest

from megatron_nft.config import Config, RolloutConfig, ServerConfig
from megatron_nft.config.engines import ENGINES
from megatron_nft.engines import serve
from megatron_nft.engines.engine import EngineError
from megatron_nft.engines.http import HttpEngineKind
from megatron_nft.engines.open import engine_kind


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_with_servers_is_complete(name):
    kind = engine_kind(name)
    assert isinstance(kind, HttpEngineKind) == RolloutConfig(engine=name).uses_servers
    if isinstance(kind, HttpEngineKind):
        assert kind.name == name
        assert kind.memory_calls.keys() == set(get_args(ServerConfig.model_fields["sleep_level"].annotation))


def test_engine_nodes_need_servers(tmp_path):
    config = Config(run_dir=tmp_path, model={"path": tmp_path}, data={"train": [tmp_path]})
    with pytest.raises(EngineError, match=r"rollout.engine=embedded has no servers"):
        serve.serve(config, tmp_path / "registry", "node", threading.Event())


SERVED = {
    "sglang": {"/get_model_info": {"model_path": "{model}"}, "/get_server_info": {"version": "0.5.23"}},
    "vllm": {"/v1/models": {"data": [{"root": "{model}"}]}, "/version": {"version": "0.32.0"}},
}


@pytest.mark.parametrize("name", SERVED)
def test_version_of_a_given_server(name, tmp_path, monkeypatch):
    model, other = tmp_path / "model", tmp_path / "other"
    model.mkdir()
    other.mkdir()
    serves = model

    def answer(url: str, paths: tuple[str, ...], key: str | None):
        assert (url, key) == ("http://127.0.0.1:9", "K")
        found = next(SERVED[name][path] for path in paths if path in SERVED[name])
        return _filled(found, serves)

    monkeypatch.setattr(f"megatron_nft.engines.{name}.kind.first_answer", answer)
    (tmp_path / "key").write_text("K\n")
    server = ServerConfig(urls=["http://127.0.0.1:9"], key_file=tmp_path / "key")
    number = {"sglang": "0.5.23", "vllm": "0.32.0"}[name]
    assert engine_kind(name).version(model, server) == f"{name} {number}"
    serves = other
    with pytest.raises(ValueError, match=r"serves .*other, not .*model; give the --model that it serves"):
        engine_kind(name).version(model, server)
    serves = Path("/only/where/the/server/runs")
    assert engine_kind(name).version(model, server) == f"{name} {number}"


def _filled(value, model: Path):
    """`value` with the model's path in the place of {model}."""
    if isinstance(value, str):
        return value.format(model=model)
    if isinstance(value, list):
        return [_filled(entry, model) for entry in value]
    return {key: _filled(entry, model) for key, entry in value.items()}
