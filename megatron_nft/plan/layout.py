"""One way to lay a run out over a machine, and the rules it has to obey before memory is looked at."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from megatron_nft.config import FP8_ALIGNMENT, Config
from megatron_nft.plan.hardware import Chip
from megatron_nft.policy.family import ModelSpec
from megatron_nft.policy.precision import size_problems


@dataclass(frozen=True)
class Cluster:
    """The devices that are asked for. Engine nodes hold engines alone; the trainer has the others."""

    chip: Chip
    nodes: int
    devices_per_node: int
    engine_nodes: int = 0

    @property
    def trainer_devices(self) -> int:
        return (self.nodes - self.engine_nodes) * self.devices_per_node


@dataclass(frozen=True)
class LayoutSettings:
    """What a plan may change of the settings; names are megatron-core's."""

    tp: int
    pp: int
    ep: int
    vpp: int  # model chunks per pipeline rank, 1 without the interleaved schedule
    sequence_parallel: bool
    recompute: str
    micro_batch_tokens: int
    offload: bool

    @classmethod
    def of(cls, config: Config) -> LayoutSettings:
        p = config.policy
        return cls(
            tp=p.tensor_model_parallel_size,
            pp=p.pipeline_model_parallel_size,
            ep=p.expert_model_parallel_size,
            vpp=p.virtual_pipeline_model_parallel_size or 1,
            sequence_parallel=p.sequence_parallel,
            recompute=p.recompute,
            micro_batch_tokens=p.micro_batch_tokens,
            offload=p.optimizer_offload,
        )

    def dp(self, cluster: Cluster) -> int:
        """Data-parallel size; check `problems` first."""
        return cluster.trainer_devices // (self.tp * self.pp)

    def overrides(self) -> list[str]:
        """The layout as key=value settings of `megatron-nft train`."""
        return [
            f"policy.tensor_model_parallel_size={self.tp}",
            f"policy.pipeline_model_parallel_size={self.pp}",
            f"policy.expert_model_parallel_size={self.ep}",
            f"policy.virtual_pipeline_model_parallel_size={self.vpp if self.vpp > 1 else 'null'}",
            f"policy.sequence_parallel={str(self.sequence_parallel).lower()}",
            f"policy.recompute={self.recompute}",
            f"policy.micro_batch_tokens={self.micro_batch_tokens}",
            f"policy.optimizer_offload={str(self.offload).lower()}",
        ]

    def describe(self) -> str:
        parts = [f"TP {self.tp}", f"PP {self.pp}"]
        parts += [f"EP {self.ep}"] * (self.ep > 1)
        parts += [f"VPP {self.vpp}"] * (self.vpp > 1) + ["sequence parallel"] * self.sequence_parallel
        parts += [f"recompute {self.recompute}", f"{self.micro_batch_tokens} tokens per micro-batch"]
        return ", ".join(parts + ["optimizer on the host"] * self.offload)


def with_seq_len(config: Config, seq_len: int) -> Config:
    """The settings for questions and answers of `seq_len` tokens at most; the micro-batch cap rises if it must."""
    response = seq_len - config.data.max_prompt_tokens
    if response < 1:
        raise ValueError(
            f"--seq-len {seq_len} leaves no token for the answer after data.max_prompt_tokens "
            f"({config.data.max_prompt_tokens}); give a larger one"
        )
    policy = config.policy.model_copy(update={"micro_batch_tokens": max(config.policy.micro_batch_tokens, seq_len)})
    rollout = config.rollout.model_copy(update={"max_response_tokens": response})
    return config.model_copy(update={"policy": policy, "rollout": rollout})


def longest_sequence(config: Config) -> int:
    """Tokens of the longest question with the longest answer."""
    return config.data.max_prompt_tokens + config.rollout.max_response_tokens


def token_multiple(config: Config, layout: LayoutSettings) -> int:
    """Packed micro-batches are padded to a multiple of this: FP8's alignment on each tensor-parallel rank's share."""
    return FP8_ALIGNMENT[config.policy.fp8.recipe] * (layout.tp if layout.sequence_parallel else 1)


def problems(spec: ModelSpec, config: Config, layout: LayoutSettings, cluster: Cluster) -> list[str]:
    """Every rule that the layout breaks, one line each; empty when it can run."""
    return (
        _divisibility(spec, config, layout, cluster)
        + _fp8(spec, config, layout, cluster)
        + _engine(spec, config, cluster)
    )


def _divisibility(spec: ModelSpec, config: Config, layout: LayoutSettings, cluster: Cluster) -> list[str]:
    tp, pp, vpp = layout.tp, layout.pp, layout.vpp
    out = []
    if cluster.trainer_devices % (tp * pp) or not cluster.trainer_devices:
        out.append(
            f"{cluster.trainer_devices} trainer GPUs cannot be divided into TP {tp} x PP {pp} = {tp * pp}: "
            "change the nodes or the layout"
        )
    for value, name in (
        (spec.num_attention_heads, "attention heads"),
        (spec.num_query_groups, "key/value heads"),
        (
            spec.moe_ffn_hidden_size or spec.ffn_hidden_size,
            "moe_intermediate_size" if spec.num_experts else "intermediate_size",
        ),
    ):
        if value % tp:
            out.append(f"tensor_model_parallel_size ({tp}) must divide the {name} ({value})")
    if layout.ep > 1 and (not spec.num_experts or spec.num_experts % layout.ep):
        out.append(f"expert_model_parallel_size ({layout.ep}) must divide num_experts ({spec.num_experts})")
    if cluster.trainer_devices % (pp * layout.ep):
        out.append(
            f"expert_model_parallel_size ({layout.ep}) x PP {pp} must divide the {cluster.trainer_devices} trainer GPUs"
        )
    if spec.num_layers % (pp * vpp):
        chunks = f" x virtual_pipeline_model_parallel_size ({vpp})" if vpp > 1 else ""
        out.append(f"pipeline_model_parallel_size ({pp}){chunks} must divide num_hidden_layers ({spec.num_layers})")
    if vpp > 1 and pp == 1:
        out.append(f"virtual_pipeline_model_parallel_size ({vpp}) needs pipeline_model_parallel_size >= 2")
    if layout.sequence_parallel and tp == 1:
        out.append("sequence_parallel needs tensor_model_parallel_size >= 2, not 1")
    if tp > cluster.devices_per_node:
        out.append(
            f"tensor_model_parallel_size ({tp}) must stay inside a node ({cluster.devices_per_node} GPUs): "
            "its traffic needs NVLink"
        )
    longest, multiple = longest_sequence(config), token_multiple(config, layout)
    padded = -(-longest // multiple) * multiple
    if padded > layout.micro_batch_tokens:
        out.append(
            f"micro_batch_tokens ({layout.micro_batch_tokens}) must hold the longest answer: {longest} tokens, "
            f"{padded} when padded to a multiple of {multiple}"
        )
    if longest > spec.max_position_embeddings:
        out.append(
            f"the longest answer ({longest} tokens with its question) exceeds the model's "
            f"max_position_embeddings ({spec.max_position_embeddings})"
        )
    dp = cluster.trainer_devices // (tp * pp)
    answers = config.train.questions_per_optimizer_step * config.rollout.answers_per_question
    if dp > answers:
        out.append(
            f"{dp} data-parallel replicas, but only {answers} answers per optimizer step: "
            "raise train.questions_per_optimizer_step or the model-parallel sizes"
        )
    return out


def _fp8(spec: ModelSpec, config: Config, layout: LayoutSettings, cluster: Cluster) -> list[str]:
    recipe = config.policy.fp8.recipe
    if recipe == "none":
        return []
    chip = cluster.chip
    if recipe not in chip.fp8_recipes:
        allowed = ", ".join(("none", *chip.fp8_recipes))
        return [f"fp8.recipe={recipe}: {chip.name} does not have it; allowed there: {allowed}"]
    return size_problems(spec, recipe, layout.tp, layout.ep)


def _engine(spec: ModelSpec, config: Config, cluster: Cluster) -> list[str]:
    if config.rollout.engine == "embedded":
        return []
    tp = config.rollout.server.tensor_parallel_size
    out = []
    servers = config.rollout.server.num_servers
    given = config.rollout.server.urls or config.rollout.server.registry
    if not given and cluster.chip.name != "cpu" and servers * tp > cluster.devices_per_node:
        out.append(
            f"rollout.server.num_servers ({servers}) x tensor_parallel_size ({tp}) = {servers * tp} exceeds the GPUs "
            f"of a node ({cluster.devices_per_node})"
        )
    if spec.num_attention_heads % tp:
        out.append(
            f"rollout.server.tensor_parallel_size ({tp}) must divide the attention heads ({spec.num_attention_heads})"
        )
    return out


def candidates(spec: ModelSpec, config: Config, cluster: Cluster) -> list[list[LayoutSettings]]:
    """Every combination of TP, PP, EP, VPP and recompute that obeys the rules, each as a ladder of what it may cost:

    as set; the smallest micro-batch cap that holds an answer; that, and the optimizer on the host (GPUs only).
    VPP is 1 or the settings' own.
    """
    current = LayoutSettings.of(config)
    tps = [t for t in range(1, cluster.devices_per_node + 1) if cluster.devices_per_node % t == 0]
    pps = [p for p in range(1, min(spec.num_layers, cluster.trainer_devices) + 1) if spec.num_layers % p == 0]
    ladders = []
    eps = [e for e in range(1, spec.num_experts + 1) if spec.num_experts % e == 0] or [1]
    for tp, pp, ep, recompute in itertools.product(tps, pps, eps, ("none", "selective", "full")):
        for vpp in sorted({1, current.vpp if pp > 1 else 1}):
            first = replace(current, tp=tp, pp=pp, ep=ep, vpp=vpp, sequence_parallel=tp > 1, recompute=recompute)
            multiple = token_multiple(config, first)
            smallest = -(-longest_sequence(config) // multiple) * multiple
            small = replace(first, micro_batch_tokens=min(smallest, first.micro_batch_tokens))
            steps = [first, small] + [replace(small, offload=True)] * (cluster.chip.name != "cpu")
            ladder = [step for step in dict.fromkeys(steps) if not problems(spec, config, step, cluster)]
            if ladder:
                ladders.append(ladder)
    return ladders
