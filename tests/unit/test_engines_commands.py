"""Command lines of servers, and the search for an engine's interpreter."""

import sys
from pathlib import Path

import pytest

from megatron_nft.config import ServerConfig
from megatron_nft.engines import host
from megatron_nft.engines.engine import NO_WEIGHTS, EngineError
from megatron_nft.engines.patience import start_timeout_s
from megatron_nft.engines.sglang import command as sglang
from megatron_nft.engines.vllm import command as vllm

COMMON = {"dtype": "bfloat16", "gpu": 4, "weight_version": -1}


def command(module, device, **settings):
    config = ServerConfig(host="127.0.0.1", **settings)
    return module.command_line(Path("/e/python"), Path("/m"), config, device=device, **COMMON)


def test_sglang_on_a_cpu():
    line = command(sglang, "cpu")
    assert line[:3] == ["/e/python", "-m", "sglang.launch_server"]
    for argument in (
        "--model-path=/m",
        "--device=cpu",
        "--dtype=bfloat16",
        "--host=127.0.0.1",
        "--attention-backend=torch_native",
        "--sampling-backend=pytorch",
        "--max-total-tokens=32768",
        "--weight-version=-1",
        "--sleep-on-idle",
        "--skip-server-warmup",
    ):
        assert argument in line
    assert not any(a.startswith(("--base-gpu-id", "--mm-feature-transport", "--trust-remote-code")) for a in line)
    environment = sglang.environment(ServerConfig(), device="cpu", gpu=0)
    assert environment["SGLANG_USE_CPU_ENGINE"] == "1"
    assert environment["OMP_NUM_THREADS"] == "1"


def test_sglang_on_a_gpu():
    line = command(
        sglang,
        "cuda",
        tensor_parallel_size=2,
        memory_saver=True,
        fp32_lm_head=True,
        deterministic=True,
        quantization="fp8",
        mem_fraction_static=0.4,
        extra_args=["--attention-backend=fa3"],
    )
    for argument in (
        "--tp-size=2",
        "--base-gpu-id=4",
        "--mm-feature-transport=cpu",
        "--enable-memory-saver",
        "--enable-fp32-lm-head",
        "--enable-deterministic-inference",
        "--quantization=fp8",
        "--mem-fraction-static=0.4",
        "--attention-backend=fa3",
    ):
        assert argument in line
    assert not any(a.startswith(("--max-total-tokens", "--attention-backend=torch_native")) for a in line)
    assert "--load-format=flash_rl" in line  # the loader that can quantize what a live update brings
    assert "--disable-cuda-graph" not in line
    assert "--disable-cuda-graph" in command(sglang, "cuda", cuda_graphs=False)
    assert "SGLANG_USE_CPU_ENGINE" not in sglang.environment(ServerConfig(), device="cuda", gpu=0)


def test_vllm_on_a_gpu(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    settings = {"tensor_parallel_size": 2, "memory_saver": True, "deterministic": True, "max_running_requests": 9}
    line = command(vllm, "cuda", **settings)
    for argument in (
        "--model=/m",
        "--tensor-parallel-size=2",
        "--enable-sleep-mode",
        "--max-num-seqs=9",
        "--logprobs-mode=processed_logprobs",
        "--gpu-memory-utilization=0.6",
    ):
        assert argument in line
    assert "--enforce-eager" not in line
    environment = vllm.environment(ServerConfig(**settings), device="cuda", gpu=4)
    assert environment["CUDA_VISIBLE_DEVICES"] == "4,5"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c")
    assert vllm.environment(ServerConfig(**settings), device="cuda", gpu=1)["CUDA_VISIBLE_DEVICES"] == "GPU-b,GPU-c"
    assert "--enforce-eager" in command(vllm, "cuda", cuda_graphs=False)
    assert environment["VLLM_BATCH_INVARIANT"] == "1"


@pytest.mark.parametrize("module", [sglang, vllm])
def test_an_fp8_cache_is_for_a_gpu(module):
    assert "--kv-cache-dtype=fp8_e4m3" in command(module, "cuda", kv_cache_dtype="fp8_e4m3")
    assert not any(a.startswith("--kv-cache-dtype") for a in command(module, "cuda"))
    with pytest.raises(EngineError, match=r"kv_cache_dtype=fp8_e4m3 needs a GPU"):
        command(module, "cpu", kv_cache_dtype="fp8_e4m3")


def test_vllm_takes_weights_by_our_extension_on_a_cpu_and_by_its_own_calls_on_a_gpu():
    own, ours = '--weight-transfer-config={"backend": "ipc"}', f"--worker-extension-cls={vllm.EXTENSION}"
    pickles = "VLLM_ALLOW_INSECURE_SERIALIZATION"  # only where handles of GPU memory come
    on_cpu, on_gpu = command(vllm, "cpu"), command(vllm, "cuda")
    assert ours in on_cpu and own not in on_cpu
    assert own in on_gpu and ours not in on_gpu
    assert pickles not in vllm.environment(ServerConfig(), device="cpu", gpu=0)
    assert vllm.environment(ServerConfig(), device="cuda", gpu=0)[pickles] == "1"
    named = {"extra_args": [f"--worker-extension-cls={vllm.EXTENSION}"]}
    assert command(vllm, "cuda", **named).count(ours) == 1 and own not in command(vllm, "cuda", **named)
    assert pickles not in vllm.environment(ServerConfig(**named), device="cuda", gpu=0)


@pytest.mark.parametrize("module", [sglang, vllm])
def test_weights_that_a_sync_brings_are_not_read_first(module):
    """A run's servers start at version -1; those of an evaluation at 0, and what is quantized starts as it goes on."""

    def formats(version: int, **settings) -> list[str]:
        config = ServerConfig(host="127.0.0.1", **settings)
        line = module.command_line(
            Path("/e"), Path("/m"), config, device="cuda", dtype="bfloat16", gpu=0, weight_version=version
        )
        return [a for a in line if a.startswith("--load-format")]

    assert formats(NO_WEIGHTS) == ["--load-format=dummy"]
    assert formats(0) == formats(3) == []
    assert "--load-format=dummy" not in formats(NO_WEIGHTS, quantization="fp8")
    assert formats(NO_WEIGHTS, extra_args=["--load-format=auto"])[-1] == "--load-format=auto"  # the later one counts


def test_patience_follows_from_the_size_of_the_model(tmp_path):
    for number, nbytes in ((1, 40_000_000_000), (2, 20_000_000_000)):
        with (tmp_path / f"model-{number}.safetensors").open("wb") as file:
            file.truncate(nbytes)  # sparse
    server = ServerConfig(tensor_parallel_size=4)
    assert start_timeout_s(server, tmp_path, 0) == 300 + 300  # 60 GB at 0.2 GB/s
    assert start_timeout_s(server, tmp_path, NO_WEIGHTS) == 300 + 15  # a quarter on each GPU, at 1 GB/s
    assert start_timeout_s(ServerConfig(quantization="fp8"), tmp_path, NO_WEIGHTS) == 600
    assert start_timeout_s(ServerConfig(start_timeout_s=42), tmp_path, 0) == 42
    assert start_timeout_s(server) == 300


def test_interpreter_that_is_set(tmp_path):
    assert host.find_python("sglang", Path(sys.executable)) == Path(sys.executable)
    with pytest.raises(EngineError, match=r"rollout.server.python=.*nothing: is not an executable file"):
        host.find_python("sglang", tmp_path / "nothing")


def test_interpreter_that_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "__file__", str(tmp_path / "megatron_nft" / "engines" / "host.py"))
    with pytest.raises(EngineError, match=r"no environment with sglang was found: run `bash tools/install_engine.sh"):
        host.find_python("sglang", None)
    assert host.find_python("numpy", None) == Path(sys.executable)  # a package of our own environment
    python = tmp_path / ".venv-sglang" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert host.find_python("sglang", None) == python


def test_vllm_for_trainers_on_other_hosts_takes_weights_over_nccl_unless_told_otherwise():
    from megatron_nft.engines.vllm.kind import KIND

    line = vllm.command_line(
        Path("/e/python"), Path("/m"), KIND.for_other_hosts(ServerConfig()), device="cuda", **COMMON
    )
    assert [a for a in line if a.startswith("--weight-transfer-config")][-1].endswith(
        '{"backend": "nccl"}'
    )  # the last counts
    for given in ('--weight-transfer-config={"backend": "ipc"}', "--worker-extension-cls=own.Extension"):
        server = ServerConfig(extra_args=[given])
        assert KIND.for_other_hosts(server) == server
