"""Shared by the rank scripts of the policy: tiny models in every layout, a fixed batch and its reference.

The reference is transformers in float64, one sequence at a time. Its gradients are written as a Hugging Face folder and
read back with `load_hf`, so that a gradient is compared shard by shard where it lies.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from launch import Ranks
from megatron.core import parallel_state

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from objectives import Objective

from megatron_nft.config import Config
from megatron_nft.data.packing import pack
from megatron_nft.metrics import Max, Mean
from megatron_nft.policy import parallel
from megatron_nft.policy.family import read_family
from megatron_nft.policy.policy import Policy
from megatron_nft.types import PackedBatch, TrainingSample
from megatron_nft.weights.import_hf import load_hf

VOCAB = 263  # odd, so that every TP size above 1 pads it
LENGTHS = ((3, 9), (4, 8), (2, 3), (5, 15), (3, 4), (1, 6), (6, 11), (2, 1))  # prompt and response tokens
DENOMINATOR = 37.0
WEIGHTS = np.array([1.0, 0.5, 0.0, 2.0], np.float32)  # of the tokens' losses, in turn; masked tokens have 0
TEMPERATURE = 0.8


@dataclass(frozen=True)
class Reference:
    """By transformers, at TEMPERATURE."""

    model: Path
    gradients: Path  # the model folder with gradients in place of weights
    logprobs: list[np.ndarray]  # per sample float64 [P + R]; position t is of token t + 1, the last is 0
    loss: float
    grad_norm: float


def samples() -> list[TrainingSample]:
    """Eight answers, lengths from 3 to 20 tokens, with advantages of both signs."""
    rng = np.random.default_rng(0)
    made = []
    for i, (prompt, response) in enumerate(LENGTHS):
        made.append(
            TrainingSample(
                draw=i,
                sample_index=0,
                input_ids=rng.integers(0, VOCAB, prompt + response).astype(np.int32),
                prompt_length=prompt,
                rollout_logprobs=np.zeros(response, np.float32),
                behaviour_logprobs=np.zeros(response, np.float32),
                correct=True,
                correct_rate=0.5,
                advantage=float(rng.normal()),
                weights=WEIGHTS[np.arange(i, i + response) % len(WEIGHTS)],
            )
        )
    return made


def token_loss(logprobs: torch.Tensor, advantage: torch.Tensor | float) -> torch.Tensor:
    """Nonlinear in the log-prob, so that a wrong log-prob shows in the gradient as well."""
    return -advantage * logprobs + 0.05 * logprobs.square()


def answer_loss(logprobs: torch.Tensor, sample: TrainingSample) -> torch.Tensor:
    """What a sample adds to the loss: its tokens' losses by their weights, over DENOMINATOR. logprobs: [R]."""
    return (token_loss(logprobs, sample.advantage) * torch.from_numpy(sample.weights)).sum() / DENOMINATOR


AnswerLoss = Callable[[torch.Tensor, TrainingSample], torch.Tensor]  # log-probs float64 [R] -> its part of the loss


def token_metrics(logprobs: torch.Tensor, loss: torch.Tensor, batch: PackedBatch) -> dict[str, Mean | Max]:
    trained = batch.loss_mask > 0
    return {"logprob": Mean(logprobs[trained], trained), "max_advantage": Max(batch.advantage[trained])}


loss = Objective(lambda logprobs, batch: token_loss(logprobs, batch.advantage), token_metrics, per_token=True)


def make_reference(
    ranks: Ranks,
    family: str,
    *,
    tied: bool,
    layers: int = 4,
    loss_of: AnswerLoss = answer_loss,
    made: list[TrainingSample] | None = None,
    **changes: object,
) -> Reference:
    """Made by rank 0, read by all. `changes` are values of config.json."""
    parts = [family, "tied" if tied else "untied", str(layers), loss_of.__name__, *map(str, changes.values())]
    folder = ranks.scratch / "-".join(parts)
    if ranks.rank == 0 and not folder.exists():
        _write_reference(folder, family, tied, layers, changes, loss_of, samples() if made is None else made)
    dist.barrier()
    figures = torch.load(folder / "figures.pt", weights_only=True)
    return Reference(
        folder,
        folder / "gradients",
        [row.numpy() for row in figures["logprobs"]],
        figures["loss"],
        figures["grad_norm"],
    )


def _write_reference(
    folder: Path,
    family: str,
    tied: bool,
    layers: int,
    changes: dict[str, object],
    loss_of: AnswerLoss,
    made: list[TrainingSample],
) -> None:
    import json

    from tiny import make_model
    from transformers import AutoModelForCausalLM

    make_model(folder, family, tied=tied, layers=layers, vocab=VOCAB)
    if changes:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    how = {"attn_implementation": "eager", "experts_implementation": "eager"}  # the grouped kernels have no float64
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **how)
    total, rows = torch.zeros((), dtype=torch.float64), []
    for sample in made:
        ids = torch.from_numpy(sample.input_ids).long()
        logits = model(ids[None]).logits[0, :-1] / TEMPERATURE
        row = torch.log_softmax(logits, -1).gather(-1, ids[1:, None]).squeeze(-1)
        total = total + loss_of(row[sample.prompt_length - 1 :], sample)
        rows.append(torch.cat([row.detach(), row.new_zeros(1)]))
    total.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    model.float().save_pretrained(folder / "gradients")
    torch.save({"logprobs": rows, "loss": total.item(), "grad_norm": norm}, folder / "figures.pt")


def make_config(
    model: Path, *, optimizer: dict | None = None, algorithm: dict | None = None, **policy: object
) -> Config:
    """Settings of a tiny run in fp32; `policy` overrides policy settings."""
    return Config.model_validate(
        {
            "run_dir": "unused",
            "model": {"path": str(model)},
            "data": {"train": ["unused"], "max_prompt_tokens": 32},
            "rollout": {"max_response_tokens": 32, "temperature": TEMPERATURE},
            "policy": {"precision": "fp32", "micro_batch_tokens": 128, "logprob_chunk_tokens": 7, **policy},
            "optimizer": {"lr": 1e-2, "lr_warmup_steps": 0, **(optimizer or {})},
            "algorithm": algorithm or {},
        }
    )


def enter_layout(config: Config) -> parallel.ParallelLayout:
    """parallel.initialize, with each layout's groups made once per job: every gloo group keeps threads that cost time,
    and Megatron's modules keep their groups alive."""
    policy, seed = config.policy, 1
    key = (
        policy.tensor_model_parallel_size,
        policy.context_parallel_size,
        policy.pipeline_model_parallel_size,
        policy.virtual_pipeline_model_parallel_size,
        policy.expert_model_parallel_size,
    )
    if key not in _LAYOUTS:
        parallel_state.destroy_model_parallel()  # forgotten, not left: they are used again
        layout = parallel.initialize(policy, seed)
        _LAYOUTS[key] = layout, {k: v for k, v in vars(parallel_state).items() if k.startswith("_") and k[1:].isupper()}
    layout, groups = _LAYOUTS[key]
    vars(parallel_state).update(groups)
    parallel.seed_trackers(seed)
    return layout


def make_policy(
    model: Path,
    *,
    optimizer: dict | None = None,
    algorithm: dict | None = None,
    load: bool = True,
    **policy: object,
) -> Policy:
    """A policy in the layout that `policy` sets, with the folder's weights."""
    config = make_config(model, optimizer=optimizer, algorithm=algorithm, **policy)
    layout = enter_layout(config)
    spec = read_family(model)
    made = Policy.create(config, spec, layout)
    if load:
        load_hf(made.chunks, model, spec, layout)
        made.reload_master_weights()
    return made


def deal(policy: Policy, splits: list[list[int]], made: list[TrainingSample] | None = None) -> list[PackedBatch]:
    """This replica's share of `splits` (sample numbers per micro-batch), filled up to one number that all can run.

    Replica 0 gets the first of every `dp_size` micro-batches and so on; the last replicas may get fillers alone.
    """
    at, made = policy.layout, samples() if made is None else made
    mine = splits[at.dp.rank :: at.dp.size]
    count = policy.layout.round_num_micro_batches(-(-len(splits) // at.dp.size))
    multiples = {"multiple_of": policy.pad_multiple, "segment_multiple": policy.segment_multiple}
    return [pack(made, indices, **multiples) for indices in mine + [[]] * (count - len(mine))]


_LAYOUTS: dict[tuple, tuple[parallel.ParallelLayout, dict]] = {}

PACKED = [[0, 1, 2, 3, 4, 5, 6, 7]]
ONE_BY_ONE = [[i] for i in range(8)]
UNEVEN = [[3, 0], [5], [7, 6, 1], [2, 4]]


def step(policy: Policy) -> float:
    """One optimizer step on the uneven split; its gradient norm."""
    return policy.train_step(deal(policy, UNEVEN), loss, DENOMINATOR, TEMPERATURE).grad_norm


def first_logprobs(policy: Policy) -> np.ndarray:
    """Of the first uneven micro-batch, the same on every rank."""
    found = [policy.compute_logprobs(deal(policy, UNEVEN), TEMPERATURE)[0]]
    dist.broadcast_object_list(found, 0)
    return found[0]


def gradient_errors(policy: Policy, reference: Reference) -> dict[str, float]:
    """Relative error |g - reference| / |reference| (2-norms) of each main gradient on this rank."""
    grads, errors = [], {}
    for chunk in policy.chunks:
        grads += [(name, p, p.main_grad.clone()) for name, p in chunk.named_parameters()]
    kept = [p.detach().clone() for _, p, _ in grads]
    load_hf(policy.chunks, reference.gradients, policy.spec, policy.layout)
    for name, parameter, grad in grads:
        errors[name] = float((grad - parameter).norm() / parameter.norm().clamp_min(1e-12))
    with torch.no_grad():
        for (_, parameter, _), value in zip(grads, kept, strict=True):
            parameter.copy_(value)
    return errors
