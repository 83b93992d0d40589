"""Too little memory is said before anything is allocated, with the numbers; peaks per phase."""

from __future__ import annotations

import pytest
import torch

from megatron_nft.config import Config
from megatron_nft.plan.hardware import CHIPS
from megatron_nft.plan.layout import Cluster, LayoutSettings
from megatron_nft.plan.memory import trainer_memory
from megatron_nft.policy.family import spec_from_config
from megatron_nft.train import memory as device_memory
from megatron_nft.train.memory import PhaseMemory, check_memory, keep_room, memory_problems

GIB = 1 << 30
FIGURES = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768,
}  # fmt: skip
QWEN_7B = spec_from_config(FIGURES)  # 7.616e9 parameters
NUM_PARAMETERS = 7_615_616_512


def make(engine: str = "sglang", server: dict | None = None, **policy: object) -> Config:
    return Config.model_validate(
        {
            "run_dir": "x",
            "model": {"path": "x"},
            "data": {"train": ["x"]},
            "policy": {"micro_batch_tokens": 8192, "recompute": "full", **policy},
            "rollout": {"engine": engine, "server": server or {}},
        }
    )


def problems(config: Config, free: float, world_size: int = 1) -> list[str]:
    return memory_problems(
        config, QWEN_7B, free=int(free * GIB), total=140 * GIB, stage=0, world_size=world_size, local_world_size=1
    )


def test_a_trainer_that_cannot_fit_is_refused_with_its_parts():
    # 18 bytes per parameter are 127.7 GiB; 4 GiB reserve
    with pytest.raises(ValueError) as error:
        problems(make(), free=120)
    weights, gradients, optimizer = (NUM_PARAMETERS * n / GIB for n in (2, 4, 12))
    assert str(error.value).startswith(
        f"the trainer alone needs {weights + gradients + optimizer + 4:.1f} GiB on this GPU "
        f"(weights {weights:.1f} GiB, gradients {gradients:.1f} GiB, optimizer {optimizer:.1f} GiB, reserve 4.0 GiB), "
        "120.0 GiB of 140.0 GiB are free"
    )


def test_an_engine_that_cannot_fit_beside_the_trainer_is_refused():
    # 140 - 127.7 - 4 leaves 8.3 GiB: less than the engine's 14.2 GiB of weights
    with pytest.raises(
        ValueError, match=r"\(0\.6\) gives the engine 5\.0 GiB of 8\.3 GiB that are free.*weights take 14\.2 GiB"
    ):
        problems(make(server={"memory_saver": True}), free=140)
    (warning,) = problems(make("embedded", micro_batch_tokens=65536), free=140)  # its engine needs no share of its own
    assert "8.3 GiB are left" in warning
    # offloaded, 42.56 GiB stay: 93.44 GiB are left, 56.07 for the engine
    assert problems(make(server={"memory_saver": True}, optimizer_offload=True), free=140) == []


def test_too_little_for_a_step_is_a_warning_with_the_numbers():
    config = make(optimizer_offload=True, micro_batch_tokens=131072, recompute="none", server={})
    (warning,) = problems(config, free=140)
    assert warning.startswith("warning: a step may need more memory than there is: activations ")
    assert "and the engine keeps 58.8 GiB" in warning  # 56.07, and its working memory of 2.69
    assert warning.endswith("policy.recompute=full or set rollout.server.memory_saver=true")


def test_log_probs_on_a_gpu_by_hand():
    config = make(precision="bf16", logprob_chunk_tokens=1024)
    cluster = Cluster(CHIPS["h100"], 1, 1)
    (stage,) = trainer_memory(QWEN_7B, config, LayoutSettings.of(config), cluster, 1)
    # half of 1024 x 152064 logits in fp32 and their gradient, the weight's gradient; hidden states, theirs, and in fp32
    expected = 512 * 152064 * 6 + 3584 * 152064 * 2 + 8192 * 3584 * (2 + 2 + 4)
    assert stage.phases["train"]["logits chunk"] == expected == 1_792_016_384


def test_what_the_engine_keeps_depends_on_the_sleep_level():
    def kept(**server: object) -> str:
        config = make(optimizer_offload=True, micro_batch_tokens=131072, recompute="none", server=server)
        (warning,) = problems(config, free=140)
        return warning

    assert "the engine keeps 16.9 GiB" in kept(memory_saver=True, sleep_level="kv_cache")
    assert "the engine keeps 2.7 GiB" in kept(memory_saver=True)
    assert "the engine keeps" not in kept(urls=["http://other:1"])


@pytest.mark.parametrize(
    ("engine", "fraction", "problem"),
    [
        # 42.56 GiB of the trainer and 4 in reserve leave 93.44 of 140. Working memory is 2.69; a sync takes 2.02: two
        # buckets of 0.5, and the embedding of 1.02
        # 1 - (2.69 + 2.02) / 93.44 = 0.949; (93.44 - 2.02) / 140 = 0.653
        ("sglang", 0.94, None),
        (
            "sglang",
            0.97,
            r"gives the engine 90\.6 GiB of 93\.4 GiB that are free; .*take 2\.7 GiB .*: set at most 0\.94\.",
        ),
        ("vllm", 0.65, None),
        (
            "vllm",
            0.67,
            r"gives the engine 93\.8 GiB of 140\.0 GiB on the GPU, 93\.4 GiB are free .*: set at most 0\.65\.",
        ),
    ],
)
def test_the_share_is_of_what_is_free_or_of_the_whole_gpu(engine, fraction, problem):
    config = make(engine, {"memory_saver": True, "mem_fraction_static": fraction}, optimizer_offload=True)
    if problem is None:
        assert problems(config, free=140) == []
    else:
        with pytest.raises(ValueError, match=problem):
            problems(config, free=140)


def test_the_free_memory_of_the_device_is_what_counts(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 * GIB, 140 * GIB))
    with pytest.raises(ValueError, match=r"100\.0 GiB of 140\.0 GiB are free"):
        check_memory(make("embedded"), QWEN_7B, torch.device("cuda", 0), stage=0, world_size=1)
    assert check_memory(make(), QWEN_7B, torch.device("cpu"), stage=0, world_size=1) == []


def test_servers_start_beside_all_that_the_trainer_will_keep(monkeypatch):
    """Of weights, gradients and Adam's state 40 GiB are allocated, the rest is held until the servers are up."""
    held: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: held.append(-1))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 40 * GIB)
    monkeypatch.setattr(torch, "empty", lambda nbytes, **_: held.append(nbytes))
    gpu = torch.device("cuda", 0)
    with keep_room(make(), QWEN_7B, gpu, stage=0, world_size=1):
        held.append(0)
    assert held == [-1, NUM_PARAMETERS * 18 - 40 * GIB, 0, -1]
    for config, device in ((make("embedded"), gpu), (make(server={"urls": ["http://other:1"]}), gpu), (make(), "cpu")):
        held.clear()
        with keep_room(config, QWEN_7B, torch.device(device), stage=0, world_size=1):
            assert held == []


def test_peaks_are_kept_per_phase_and_given_once(monkeypatch):
    peaks, free = iter([5, 9, 7]), iter([60, 50, 55])
    monkeypatch.setattr(device_memory.torch.cuda, "max_memory_allocated", lambda device: next(peaks))
    monkeypatch.setattr(device_memory.torch.cuda, "mem_get_info", lambda device: (next(free), 100))
    monkeypatch.setattr(device_memory.torch.cuda, "reset_peak_memory_stats", lambda device: None)
    memory = PhaseMemory(torch.device("cuda"))
    for phase in ("train", "generate", "train"):
        memory.note(phase)
    assert memory.take() == {"train": (7, 45), "generate": (9, 50)}
    assert memory.take() == {}
    none = PhaseMemory(torch.device("cpu"))
    none.note("train")
    assert none.take() == {}
