"""Seconds of one training step by phase, from FLOPs, bytes and the chip's rates. A model, not a measurement.

Legend: N parameters that a token is multiplied with, L layers, q = heads x head_dim, kv = key/value heads x head_dim,
n answers, l mean tokens of question and answer, W devices.

    linear forward       2 N FLOPs per token (Kaplan et al., arXiv 2001.08361, section 2.1)
    attention forward    2 q l L FLOPs per token, causal (4 q l L without the mask; Narayanan et al., arXiv 2104.04473)
    behaviour log-probs  one forward; reference log-probs (algorithm.reference=ema) one of what is trained
    training             forward + 2 x forward for the backward; full recompute one forward more, selective the MLPs'
    tensor parallel      per layer, micro-batch and pass 4 collectives of T h e (tp-1)/tp bytes; 2 passes, and one pass
                         again with full recompute (Korthikanti et al., arXiv 2205.05198)
    context parallel     per layer K and V of each token, 2 kv e / tp bytes, pass the cp - 1 other ranks of its group;
                         backward with their gradients, twice that. Counted in full, although Transformer Engine sends
                         while it multiplies
    pipeline             (pp - 1) / (vpp m) of the compute stands idle (arXiv 2104.04473, section 2.2)
    gradients            per optimizer step reduce-scatter 4 bytes and all-gather e bytes per parameter over DP x CP
    optimizer            28 + e bytes of device memory per parameter of the shard (g, m, v, w read, m, v, w and the
                         model's own written); with offload, gradients out and weights back over the host link
    generation           an engine emits one token for B answers in (weights + cache of B answers) / bandwidth, or in
                         the time of its FLOPs if that is longer, plus 20 us per layer of launches and reductions;
                         its answers take answers / B mean lengths, and then the longest one finishes alone
    sync                 see sync_time.py
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_nft.config import Config
from megatron_nft.plan.architecture import (
    active_params,
    dense_params,
    kv_size,
    local_expert_params,
    mlp_width,
    q_size,
)
from megatron_nft.plan.decoding import DecodeModel
from megatron_nft.plan.layout import Cluster, LayoutSettings, element_bytes
from megatron_nft.plan.memory import engine_beside_trainer, optimizer_shard
from megatron_nft.plan.sync_time import sync_time
from megatron_nft.policy.family import ModelSpec

DECODE_OVERHEAD_S_PER_LAYER = 20e-6
VERIFY_S_PER_ANSWER = 5e-3  # of plain math-verify, mean of a mixed set on one core; the default grader is faster
ENGINE_SWITCH_S = 2.0  # release and resume of a colocated engine's memory


@dataclass(frozen=True)
class Workload:
    """How much one training step handles; the assumptions are printed beside the times."""

    mean_prompt_tokens: int
    mean_response_tokens: int
    kept_share: float  # questions whose answers differ, of those sampled
    sampled_questions: int  # per step, on average
    trained_questions: int
    answers_per_question: int
    optimizer_steps: int
    num_epochs: int

    @property
    def mean_tokens(self) -> int:
        return self.mean_prompt_tokens + self.mean_response_tokens

    @property
    def sampled_answers(self) -> int:
        return self.sampled_questions * self.answers_per_question

    @property
    def trained_tokens(self) -> int:
        """Tokens through forward and backward in one step, questions included."""
        return self.trained_questions * self.answers_per_question * self.mean_tokens * self.num_epochs

    @classmethod
    def of(cls, config: Config, mean_response_tokens: int | None, kept_share: float) -> Workload:
        """The workload that the settings ask for. Without `mean_response_tokens`, answers are assumed to take a third
        of the longest. ValueError where it exceeds the longest."""
        longest = config.rollout.max_response_tokens
        response = mean_response_tokens or max(1, longest // 3)
        if response > longest:
            raise ValueError(f"--mean-response-tokens {response} exceeds rollout.max_response_tokens ({longest})")
        needed = math.ceil(config.train.questions_per_step / kept_share)
        batch = config.rollout.questions_per_batch
        # Surplus groups serve the next step; without them whole generation batches are paid for.
        sampled = needed if config.rollout.max_staleness else -(-needed // batch) * batch
        return cls(
            mean_prompt_tokens=min(128, config.data.max_prompt_tokens),
            mean_response_tokens=response,
            kept_share=kept_share,
            sampled_questions=sampled,
            trained_questions=config.train.questions_per_step,
            answers_per_question=config.rollout.answers_per_question,
            optimizer_steps=config.train.questions_per_step
            // config.train.questions_per_optimizer_step
            * config.train.num_epochs,
            num_epochs=config.train.num_epochs,
        )


def num_micro_batches(work: Workload, layout: LayoutSettings, dp: int) -> int:
    """Micro-batches of one replica in one optimizer step."""
    per_step = work.trained_tokens / max(1, work.optimizer_steps) / dp
    return max(1, math.ceil(per_step / layout.micro_batch_tokens))


def forward_flops_per_token(spec: ModelSpec, mean_tokens: float) -> float:
    """FLOPs of linear layers, output layer and causal attention in a forward pass."""
    return 2 * active_params(spec) + 2 * q_size(spec) * mean_tokens * spec.num_layers


def _flops_rate(config: Config, cluster: Cluster) -> float:
    chip = cluster.chip
    if config.policy.fp8.recipe != "none":
        return chip.fp8_flops * chip.fp8_share
    return chip.bf16_flops * chip.train_share


def _tensor_parallel_s(
    spec: ModelSpec, config: Config, layout: LayoutSettings, cluster: Cluster, tokens: float, passes: float
) -> float:
    """Seconds of the collectives for `tokens` tokens of one replica through its share of the layers."""
    tp, chip = layout.tp, cluster.chip
    if tp == 1:
        return 0.0
    volume = tokens / layout.cp * spec.hidden_size * element_bytes(config) * (tp - 1) / tp
    return 4 * passes * volume * (spec.num_layers / layout.pp) / (chip.node_bandwidth * chip.bandwidth_share)


def _context_parallel_s(
    spec: ModelSpec, config: Config, layout: LayoutSettings, cluster: Cluster, tokens: float, passes: float
) -> float:
    """Seconds in which keys and values of `tokens` tokens of one replica go round, in `passes` forward equivalents."""
    if layout.cp == 1:
        return 0.0
    inside = layout.tp * layout.cp <= cluster.devices_per_node
    link = cluster.chip.node_bandwidth if inside else cluster.chip.network_bandwidth
    volume = tokens / layout.cp * (layout.cp - 1) * 2 * kv_size(spec) / layout.tp * element_bytes(config)
    return passes * volume * (spec.num_layers / layout.pp) / (link * cluster.chip.bandwidth_share)


def _compute_s(
    spec: ModelSpec,
    config: Config,
    layout: LayoutSettings,
    cluster: Cluster,
    tokens: float,
    passes: float,
    work: Workload,
) -> float:
    """Seconds of `passes` forward equivalents over `tokens` tokens of all replicas, with TP and CP traffic and the
    pipeline's bubble."""
    dp = layout.dp(cluster)
    flops = tokens * passes * forward_flops_per_token(spec, work.mean_tokens)
    busy = flops / (cluster.trainer_devices * _flops_rate(config, cluster))
    busy += _tensor_parallel_s(spec, config, layout, cluster, tokens / dp, 1 if passes <= 1 else passes - 1)
    busy += _context_parallel_s(spec, config, layout, cluster, tokens / dp, passes)
    bubble = (layout.pp - 1) / (layout.vpp * num_micro_batches(work, layout, dp))
    return busy * (1 + bubble)


def _training_passes(spec: ModelSpec, layout: LayoutSettings) -> float:
    if layout.recompute == "full":
        return 4.0
    mlp_share = 3 * spec.hidden_size * mlp_width(spec) * spec.num_layers / active_params(spec)
    return 3.0 + (mlp_share if layout.recompute == "selective" else 0.0)


def _optimizer_s(spec: ModelSpec, config: Config, layout: LayoutSettings, cluster: Cluster) -> float:
    """Seconds of one optimizer step: gradients over data and context parallel, Adam, weights over both."""
    chip, copies, e = cluster.chip, layout.copies(cluster), element_bytes(config)
    params = max(dense_params(spec, layout.tp, layout.pp, s) for s in range(layout.pp))
    params += local_expert_params(spec, layout.tp, layout.pp, layout.ep)
    shard = max(optimizer_shard(spec, config, layout, cluster, s) for s in range(layout.pp))
    inside = cluster.trainer_devices <= cluster.devices_per_node
    link = (chip.node_bandwidth if inside else chip.network_bandwidth) * chip.bandwidth_share
    seconds = params * (4 + e) * (copies - 1) / copies / link
    seconds += shard * (28 + e) / (chip.memory_bandwidth * chip.bandwidth_share)
    return seconds + (shard * (4 + e) / chip.host_bandwidth if layout.offload else 0.0)


def num_engines(config: Config, cluster: Cluster) -> int:
    """Engines that share a step's questions."""
    server = config.rollout.server
    if not config.rollout.uses_servers:
        return cluster.trainer_devices
    return len(server.urls) or (cluster.engine_nodes or cluster.nodes) * server.num_servers


def decode_model(
    spec: ModelSpec, config: Config, layout: LayoutSettings, cluster: Cluster, work: Workload
) -> DecodeModel:
    """What one engine can do."""
    chip, memory = cluster.chip, engine_beside_trainer(spec, config, layout, cluster)
    servers = config.rollout.uses_servers
    tp = config.rollout.server.tensor_parallel_size if servers else 1
    bandwidth = chip.memory_bandwidth * chip.bandwidth_share
    flops = 2 * active_params(spec) / tp / (chip.bf16_flops * chip.train_share)
    fitting = memory.kv_tokens // (work.mean_tokens if servers else work.mean_tokens * 2)
    return DecodeModel(
        max_rows=max(1, min(int(fitting), config.rollout.server.max_running_requests or int(fitting))),
        weights_s=memory.weights / bandwidth,
        context_s=memory.kv_cache / max(1, memory.kv_tokens) / bandwidth,
        row_s=flops,
        overhead_s=DECODE_OVERHEAD_S_PER_LAYER * spec.num_layers,
        prefill_s=flops,
    )


def generation_s(spec: ModelSpec, config: Config, layout: LayoutSettings, cluster: Cluster, work: Workload) -> float:
    """Seconds until the last answer of a step is there."""
    engine, engines = decode_model(spec, config, layout, cluster, work), num_engines(config, cluster)
    answers = math.ceil(work.sampled_answers / engines)
    batch = min(answers, engine.max_rows)
    context = work.mean_prompt_tokens + work.mean_response_tokens / 2
    rounds = answers / batch
    tail = config.rollout.max_response_tokens - work.mean_response_tokens
    prefill = work.sampled_questions / engines * work.mean_prompt_tokens * engine.prefill_s
    decoding = rounds * work.mean_response_tokens * engine.step_s(batch, batch * context)
    return prefill + decoding + tail * engine.step_s(1, context)


def step_times(
    spec: ModelSpec, config: Config, layout: LayoutSettings, cluster: Cluster, work: Workload
) -> dict[str, float]:
    """Seconds by phase, in the order of the loop. Verification overlaps generation: only what is left counts."""
    generation = generation_s(spec, config, layout, cluster, work)
    verification = work.sampled_answers * VERIFY_S_PER_ANSWER / (cluster.trainer_devices * config.verify.workers)
    kept_tokens = work.sampled_questions * work.kept_share * work.answers_per_question * work.mean_tokens
    passes = _training_passes(spec, layout)
    times = {
        "generation": generation,
        "verification left over": max(0.0, verification - generation),
        "behaviour log-probs": _compute_s(spec, config, layout, cluster, kept_tokens, 1.0, work),
        "forward and backward": _compute_s(spec, config, layout, cluster, work.trained_tokens, passes, work),
        "optimizer": work.optimizer_steps * _optimizer_s(spec, config, layout, cluster),
        "weight sync": sync_time(spec, config, layout, cluster).total_s,
    }
    if config.algorithm.average_decay is not None:
        scored = work.trained_tokens / work.num_epochs
        times["reference log-probs"] = _compute_s(spec, config, layout, cluster, scored, 1.0, work)
    if config.rollout.server.memory_saver and config.rollout.uses_servers:
        times["engine sleep and wake"] = ENGINE_SWITCH_S
    return times
