"""CPU support: every replaced name exists in the installed packages, does what Megatron needs, and is left alone with
CUDA."""

import importlib
import json
import subprocess
import sys

import pytest
import torch

from megatron_nft.policy import cpu
from megatron_nft.policy.megatron_versions import ONLY_WITH_TRANSFORMER_ENGINE

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="replacements are for machines without CUDA")


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    assert cpu.install() is True


@pytest.fixture(scope="module")
def replaced_in_a_fresh_process() -> dict[str, bool]:
    """Name -> whether `install` put something else there; asked where nothing is replaced yet."""
    code = (
        "import json\n"
        "from megatron_nft.policy import cpu\n"
        "before = {key: cpu.resolve(*key)[2] for key in cpu.REPLACED}\n"
        "cpu.install()\n"
        "print(json.dumps({'.'.join(key): cpu.resolve(*key)[2] is not old for key, old in before.items()}))\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", [".".join(key) for key in cpu.REPLACED])
def test_the_name_exists_and_is_replaced(name: str, replaced_in_a_fresh_process: dict[str, bool]) -> None:
    assert replaced_in_a_fresh_process[name]


def test_a_name_that_is_gone_is_named_with_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    key = ("megatron.core.tensor_parallel.random", "_renamed_in_the_next_release")
    monkeypatch.setitem(cpu.REPLACED, key, lambda original: original)
    with pytest.raises(RuntimeError, match=r"random\._renamed_in_the_next_release does not exist .*megatron-core 0\."):
        cpu.install.__wrapped__()


def test_nothing_is_done_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    assert cpu.install.__wrapped__() is False
    with cpu.on_cpu():
        assert not torch.overrides._get_current_function_mode_stack()


def test_device_and_rng_functions() -> None:
    assert torch.cuda.current_device() == torch.device("cpu")
    torch.cuda.manual_seed(7)
    state = torch.cuda.get_rng_state()
    assert torch.equal(torch.cuda.random.get_rng_state(), state)
    drawn = torch.rand(3)
    module = importlib.import_module("megatron.core.tensor_parallel.random")
    module._set_cuda_rng_state(state)
    assert torch.equal(torch.rand(3), drawn)


def test_streams_have_always_finished() -> None:
    stream = torch.cuda.Stream()
    assert torch.cuda.current_stream() == torch.cuda.default_stream() == stream
    stream.wait_stream(torch.cuda.current_stream())
    stream.record_event().synchronize()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        pass


def test_token_counts_become_numpy_on_demand() -> None:
    move = importlib.import_module("megatron.core.transformer.moe.token_dispatcher").maybe_move_tensor_to_cpu
    counts = torch.tensor([3, 1])
    assert move(counts, as_numpy=True).tolist() == [3, 1] and not torch.is_tensor(move(counts, as_numpy=True))
    assert move(counts) is counts and move(None, as_numpy=True) is None


def test_device_arguments_are_mapped_inside_the_mode_only() -> None:
    with cpu.on_cpu():
        for made in (
            torch.zeros(2, device="cuda"),
            torch.tensor([1.0], device=torch.device("cuda", 0)),
            torch.ones(2).cuda(),
            torch.ones(2).to(device="cuda"),
        ):
            assert made.device.type == "cpu"
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        with cpu.on_cpu():  # nested: once is enough
            assert len(torch.overrides._get_current_function_mode_stack()) == 1
    assert torch.zeros(1).type() == "torch.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda")


def test_the_mode_ends_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), cpu.on_cpu():
        raise ZeroDivisionError
    assert not torch.overrides._get_current_function_mode_stack()


def test_names_that_only_transformer_engine_defines() -> None:
    for module, name in ONLY_WITH_TRANSFORMER_ENGINE:
        assert hasattr(importlib.import_module(module), name)
