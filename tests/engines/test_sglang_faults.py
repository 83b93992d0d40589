"""Real SGLang servers that die, never come up, or lose the process that started them."""

import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from processes import alive, below, server_of, wait_until

from megatron_nft.engines.engine import EngineError, Request, SamplingParams
from megatron_nft.engines.open import open_engine
from megatron_nft.engines.sglang.client import SGLangEngine
from megatron_nft.engines.sglang.kind import KIND
from megatron_nft.engines.start import start_servers


def kill_in_the_middle(engine, group, sampling, requests):
    """All answers of a rollout during which the (only) server of `group` is killed."""
    answers = engine.generate(requests, sampling)
    seen = [next(answers)]
    os.kill(server_of(group.servers[0]._supervisor.pid), signal.SIGKILL)
    return seen + list(answers)


def test_a_server_that_is_killed(sglang_server, sglang_engine, sglang_model, sglang_rollout, tmp_path):
    """With another server every answer comes. Alone it is started again, within the bound, and then a clear error."""
    once = sglang_rollout.server.model_copy(update={"max_restarts": 1})
    sglang_rollout = sglang_rollout.model_copy(update={"server": once})
    second = start_servers(
        KIND, sglang_model, sglang_rollout, precision="fp32", device="cpu", log_dir=tmp_path, weight_version=0
    )
    server = sglang_rollout.server
    both = SGLangEngine([*second.urls, *sglang_server.urls], server, weight_version=0)
    alone = SGLangEngine(second.urls, server, weight_version=0, group=second)
    requests = [Request(np.arange(40, 46, dtype=np.int32), 2, (0, i)) for i in range(64)]
    try:
        seen = kill_in_the_middle(both, second, SamplingParams(60), requests)
        assert {(i, k) for i, k, _ in seen} == {(i, k) for i in range(64) for k in range(2)}
        wait_until(lambda: second.servers[0].starts == 2, 60, "a new start")
        wait_until(second.servers[0].is_healthy, 500, "health")
        with pytest.raises(EngineError, match=r"(?s)no server was up .*ended with exit code 137; the end of"):
            kill_in_the_middle(alone, second, SamplingParams(400), requests)
    finally:
        both.close()
        alone.close()


def test_a_model_that_cannot_be_loaded_is_told_with_the_log(sglang_rollout, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"architectures": ["NoSuchModel"], "model_type": "qwen2"}')
    with pytest.raises(EngineError, match=r"(?s)sglang server 0 on .* ended with exit code .*end of .*sglang-.*\.log"):
        open_engine(tmp_path / "model", sglang_rollout, precision="fp32", log_dir=tmp_path)


def test_one_that_takes_too_long_is_ended(sglang_model, sglang_rollout, tmp_path):
    before = below(os.getpid())
    impatient = sglang_rollout.model_copy(
        update={"server": sglang_rollout.server.model_copy(update={"start_timeout_s": 1.0})}
    )
    with pytest.raises(EngineError, match="did not answer within 1 s"):
        open_engine(sglang_model, impatient, precision="fp32", log_dir=tmp_path)
    assert not below(os.getpid()) - before


def test_no_process_outlives_a_killed_starter(sglang_model, sglang_rollout, tmp_path):
    starter = textwrap.dedent(
        f"""
        import time
        from pathlib import Path
        from megatron_nft.config import RolloutConfig
        from megatron_nft.engines.open import open_engine
        rollout = RolloutConfig.model_validate_json({sglang_rollout.model_dump_json()!r})
        engine = open_engine(Path({str(sglang_model)!r}), rollout, precision="fp32", log_dir=Path({str(tmp_path)!r}))
        print("up", flush=True)
        time.sleep(600)
        """
    )
    with subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"up\n"
        family = below(process.pid)
        assert len(family) >= 5  # supervisor (2), server, scheduler, detokenizer
        process.kill()
        process.wait(20)
        wait_until(lambda: not alive(family), 30, "the end of the server")
