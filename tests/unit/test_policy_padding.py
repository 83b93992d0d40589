"""Padding of packed batches stays out of loss, gradients and the scales of FP8."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import make_model

from megatron_nft.config import Config
from megatron_nft.data.packing import pack, unpack
from megatron_nft.policy import cpu, parallel
from megatron_nft.policy.family import read_family
from megatron_nft.policy.model import build_chunks, packed_params
from megatron_nft.types import TrainingSample
from megatron_nft.weights.import_hf import load_hf

LENGTHS = (13, 29, 7)


def make_samples() -> list[TrainingSample]:
    rng = np.random.default_rng(3)
    made = []
    for i, n in enumerate(LENGTHS):
        zeros = np.zeros(n - 2, np.float32)
        ids = rng.integers(1, 256, n).astype(np.int32)
        made.append(TrainingSample(i, 0, ids, 2, zeros, zeros, correct=True, correct_rate=0.5))
    return made


@pytest.fixture(scope="module")
def chunk(tmp_path_factory):
    folder = make_model(tmp_path_factory.mktemp("model"), "qwen2", hidden=32, layers=2, heads=2, kv_heads=1)
    config = Config.model_validate(
        {
            "run_dir": "unused",
            "model": {"path": str(folder)},
            "data": {"train": ["unused"], "max_prompt_tokens": 32},
            "rollout": {"max_response_tokens": 32},
            "policy": {"precision": "fp32", "micro_batch_tokens": 128},
        }
    )
    layout = parallel.initialize(config.policy, seed=1)
    spec = read_family(folder)
    chunks = build_chunks(spec, config.policy, layout)
    load_hf(chunks, folder, spec, layout)
    yield chunks[0]
    parallel.shutdown()


def largest_inputs(chunk, batch) -> dict[str, float]:
    """Largest |input| of every linear layer inside the transformer layers, which is what sets a per-tensor scale."""
    found: dict[str, float] = {}

    def note(name):
        return lambda module, args: found.__setitem__(name, args[0].abs().max().item())

    linears = [(n, m) for n, m in chunk.decoder.named_modules() if n.split(".")[-1].startswith("linear_")]
    assert len(linears) == 8
    hooks = [m.register_forward_pre_hook(note(n)) for n, m in linears]
    with cpu.on_cpu(), torch.no_grad():
        chunk(batch.tokens[None], batch.position_ids[None], None, packed_seq_params=packed_params(batch, False))
    for hook in hooks:
        hook.remove()
    return found


def test_padding_repeats_the_longest_sample_and_carries_no_loss():
    made = make_samples()
    batch = pack(made, [0, 1, 2], multiple_of=16)
    assert batch.tokens.numel() == 64
    assert batch.cu_seqlens.tolist() == [0, 13, 42, 49, 64]
    assert batch.tokens[49:].tolist() == made[1].input_ids[:15].tolist()
    assert batch.position_ids[49:].tolist() == list(range(15))
    assert batch.loss_mask[49:].sum() == 0
    assert batch.labels[49:].tolist() == [0] * 15


def test_padding_longer_than_every_sample_starts_over():
    made = make_samples()[2:]
    batch = pack(made, [0], multiple_of=32)  # 25 tokens of padding after 7
    assert batch.tokens[7:].tolist() == np.resize(made[0].input_ids, 25).tolist()
    assert batch.cu_seqlens.tolist() == [0, 7, 14, 21, 28, 32]
    assert batch.position_ids.tolist() == [*range(7), *range(7), *range(7), *range(7), *range(4)]
    assert batch.max_seqlen == 7
    (values,) = unpack(batch.tokens, batch)
    assert (
        values.tolist() == made[0].input_ids[1:-1].tolist()
    )  # where the response is predicted; nothing of the padding


@pytest.mark.parametrize("multiple", [16, 128])
def test_padding_does_not_change_the_scales(chunk, multiple):
    made = make_samples()
    plain, padded = (pack(made, [0, 1, 2], multiple_of=n) for n in (1, multiple))
    expected, found = largest_inputs(chunk, plain), largest_inputs(chunk, padded)
    assert found == pytest.approx(expected, rel=1e-6)
    other = pack(made, [0, 1, 2], multiple_of=16)
    other.tokens[49:] = 0
    zeros = largest_inputs(chunk, other)
    assert any(abs(zeros[n] - expected[n]) > 1e-3 * expected[n] for n in expected), "the test would not see padding"
