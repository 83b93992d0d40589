"""Real servers with the key of a run: no endpoint answers anybody else, and our clients work as usual."""

from __future__ import annotations

import os
from pathlib import Path

import httpx
import numpy as np
import pytest
from environments import install
from processes import below

from megatron_nft.config import RolloutConfig
from megatron_nft.engines import keys
from megatron_nft.engines.engine import Request, SamplingParams
from megatron_nft.engines.open import engine_kind, open_engine
from megatron_nft.engines.start import start_servers

CONTROL = {
    "sglang": (
        "/update_weights_from_tensor",
        "/update_weights_from_disk",
        "/update_weights_from_distributed",
        "/init_weights_update_group",
        "/update_weight_version",
        "/pause_generation",
        "/continue_generation",
        "/flush_cache",
        "/abort_request",
        "/weights_checker",
        "/release_memory_occupation",
        "/resume_memory_occupation",
        "/health_generate",
        "/generate",
    ),
    "vllm": (
        "/collective_rpc",
        "/pause",
        "/resume",
        "/reset_prefix_cache",
        "/update_weight_version",
        "/inference/v1/generate",
    ),
}
STRANGERS = ({}, {"Authorization": "Bearer wrong"}, {"Authorization": ""})


def endpoints(url: str, key: str) -> set[tuple[str, str]]:
    """(method, path) of everything that the server says it has."""
    paths = httpx.get(f"{url}/openapi.json", headers=keys.headers(key), timeout=60, trust_env=False).json()["paths"]
    return {(method.upper(), path.replace("{", "").replace("}", "")) for path in paths for method in paths[path]}


def check_closed_to_strangers(url: str, key: str, name: str) -> None:
    known = endpoints(url, key)
    assert set(CONTROL[name]) <= {path for _, path in known}
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        answered = {
            (method, path)
            for method, path in known | {("GET", "/openapi.json"), ("GET", "/metrics"), ("OPTIONS", "/generate")}
            for stranger in (STRANGERS if path in CONTROL[name] else STRANGERS[:1])
            if client.request(method, path, headers=stranger).status_code != 401
        }
    assert answered == {("GET", "/health")}


def check_answers(engine) -> None:
    request = Request(np.arange(40, 46, dtype=np.int32), 2, (0, 0))
    found = sorted((i, k, len(c.token_ids)) for i, k, c in engine.generate([request], SamplingParams(4)))
    assert [(i, k) for i, k, _ in found] == [(0, 0), (0, 1)] and all(0 < n <= 4 for _, _, n in found)
    assert len(engine.prompt_logprobs(request.prompt_ids)) == 5


def check_key_is_nowhere_to_be_read(pids: set[int], key: str, logs: Path) -> None:
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids]
    assert any(b"--port" in c for c in commands) and not any(key.encode() in c for c in commands)
    texts = [path.read_text(errors="replace") for path in logs.rglob("*.log")]
    assert texts and all(texts) and not any(key in text for text in texts)


def check_engine(name: str, model: Path, rollout, folder: Path, **settings) -> None:
    """A server is started with a key, asked by strangers, and then used through our clients with the key's file."""
    kind, key, before = engine_kind(name), keys.new_key(), below(os.getpid())
    (folder / "logs").mkdir(parents=True)
    given = {"precision": "fp32", "device": "cpu", "log_dir": folder / "logs", "weight_version": 0}
    group = start_servers(kind, model, rollout, **given, key=key)
    try:
        (url,) = group.urls
        check_closed_to_strangers(url, key, name)
        keys.write_key(folder / "key", key)
        server = rollout.server.model_copy(update={"urls": [url], "key_file": folder / "key", **settings})
        engine = open_engine(
            model, rollout.model_copy(update={"server": server}), precision="fp32", log_dir=folder / "logs"
        )
        try:
            check_answers(engine)
            weights = engine._weight_client(url, 60)
            weights.configure(weights.facts())
            weights.pause("finish")
            weights.resume()
            weights.close()
            check_key_is_nowhere_to_be_read(below(os.getpid()) - before, key, folder / "logs")
            if settings.get("router"):
                answers = [httpx.get(f"{engine._router.url}/workers", trust_env=False).status_code]
                answers += [httpx.post(f"{engine._router.url}/generate", json={}, trust_env=False).status_code]
                assert answers == [401, 401]
        finally:
            engine.close()
    finally:
        group.close()


def test_sglang(sglang_model, sglang_rollout, tmp_path):
    """With the router in front of it."""
    check_engine("sglang", sglang_model, sglang_rollout, tmp_path, router=True)


@pytest.mark.long
def test_vllm(vllm_model, tmp_path):
    install("vllm")
    check_engine("vllm", vllm_model, RolloutConfig(engine="vllm", server={"start_timeout_s": 500}), tmp_path)
