"""Policies and batches on one GPU, for the tests and benchmarks of the GPU path."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from objectives import Objective

from megatron_nft.config import Config
from megatron_nft.data.packing import pack
from megatron_nft.policy.family import ModelSpec, read_family
from megatron_nft.policy.parallel import ParallelLayout
from megatron_nft.policy.policy import Policy
from megatron_nft.types import PackedBatch, TrainingSample
from megatron_nft.weights.import_hf import load_hf

LONGEST = 4096


def make_config(
    model: Path | str,
    *,
    optimizer: dict | None = None,
    rollout: dict | None = None,
    data: dict | None = None,
    **policy: object,
) -> Config:
    """Transformer Engine layers; `policy` overrides policy settings."""
    return Config.model_validate(
        {
            "run_dir": str(Path(model).parent / "run"),
            "model": {"path": str(model)},
            "data": {"train": ["unused"], "max_prompt_tokens": 64, **(data or {})},
            "rollout": {"max_response_tokens": 64, **(rollout or {})},
            "policy": {"layer_spec": "transformer_engine", "micro_batch_tokens": LONGEST, **policy},
            "optimizer": {"lr": 1e-3, "lr_warmup_steps": 0, **(optimizer or {})},
        }
    )


def make_policy(layout: ParallelLayout, model: Path | str, **settings: object) -> Policy:
    """A policy with the weights of the folder `model`."""
    config = make_config(model, **settings)
    spec = read_family(model)
    policy = Policy.create(config, spec, layout)
    load_hf(policy.chunks, model, spec, layout)
    policy.reload_master_weights()
    return policy


@torch.no_grad()
def fill_random(chunks: list[torch.nn.Module], seed: int = 0, std: float = 0.02) -> None:
    """Weights for a model that has no folder: matrices normal, norms one, biases zero."""
    generator = torch.Generator("cuda").manual_seed(seed)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, std, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def random_policy(layout: ParallelLayout, spec: ModelSpec, config: Config) -> Policy:
    """A policy with random weights and no folder."""
    policy = Policy.create(config, spec, layout)
    fill_random(policy.chunks)
    policy.reload_master_weights()
    return policy


def make_samples(lengths: list[int], vocab: int, seed: int = 0) -> list[TrainingSample]:
    """Answers to one-token questions, of random tokens, alternately right and wrong."""
    rng = np.random.default_rng(seed)
    made = []
    for i, n in enumerate(lengths):
        zeros = np.zeros(n - 1, np.float32)
        ids = rng.integers(0, vocab, n).astype(np.int32)
        made.append(TrainingSample(i, 0, ids, 1, zeros, zeros, i % 2 == 0, 0.5, advantage=1.0 if i % 2 == 0 else -1.0))
    return made


def packed(policy: Policy, samples: list[TrainingSample], splits: list[list[int]] | None = None) -> list[PackedBatch]:
    """Micro-batches on the GPU, padded as the policy needs; by default one that holds all samples."""
    splits = splits or [list(range(len(samples)))]
    multiples = {"multiple_of": policy.pad_multiple, "segment_multiple": policy.segment_multiple}
    return [pack(samples, part, device=policy.layout.device, **multiples) for part in splits]


def weighted_likelihood(logprobs: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """-log p of every response token, weighted by the advantage."""
    return -logprobs * batch.advantage


likelihood_loss = Objective(weighted_likelihood)


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    """Main gradients fp32 of the step that was just made, before they are zeroed by the next."""
    return {name: p.main_grad.clone() for chunk in policy.chunks for name, p in chunk.named_parameters()}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|, 2-norms, in float64."""
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()
