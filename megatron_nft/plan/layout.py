"""A layout of a run over a cluster, and the rules that it must obey before its memory is calculated."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

from megatron_nft.config import Config, PolicyConfig
from megatron_nft.plan.hardware import Chip
from megatron_nft.policy.family import ModelSpec, split_problems
from megatron_nft.policy.precision import size_problems


@dataclass(frozen=True)
class Cluster:
    """The devices that a run gets. Engine nodes hold only engines; the trainer has the other nodes."""

    chip: Chip
    nodes: int
    devices_per_node: int
    engine_nodes: int = 0

    @property
    def trainer_devices(self) -> int:
        return (self.nodes - self.engine_nodes) * self.devices_per_node


@dataclass(frozen=True)
class LayoutSettings:
    """The settings that a plan may change, under megatron-core's abbreviations."""

    tp: int
    cp: int
    pp: int
    ep: int
    vpp: int  # model chunks per pipeline rank, 1 without the interleaved schedule
    sequence_parallel: bool
    recompute: str
    micro_batch_tokens: int
    offload: bool

    @classmethod
    def of(cls, config: Config) -> LayoutSettings:
        """The layout that the settings ask for."""
        p = config.policy
        return cls(
            tp=p.tensor_model_parallel_size,
            cp=p.context_parallel_size,
            pp=p.pipeline_model_parallel_size,
            ep=p.expert_model_parallel_size,
            vpp=p.virtual_pipeline_model_parallel_size or 1,
            sequence_parallel=p.sequence_parallel,
            recompute=p.recompute,
            micro_batch_tokens=p.micro_batch_tokens,
            offload=p.optimizer_offload,
        )

    def applied_to(self, policy: PolicyConfig) -> PolicyConfig:
        """`policy` with this layout in place of its own."""
        return policy.model_copy(update=self._settings())

    def _settings(self) -> dict[str, Any]:
        """The layout under the names of the policy's settings."""
        return {
            "tensor_model_parallel_size": self.tp,
            "context_parallel_size": self.cp,
            "pipeline_model_parallel_size": self.pp,
            "expert_model_parallel_size": self.ep,
            "virtual_pipeline_model_parallel_size": self.vpp if self.vpp > 1 else None,
            "sequence_parallel": self.sequence_parallel,
            "recompute": self.recompute,
            "micro_batch_tokens": self.micro_batch_tokens,
            "optimizer_offload": self.offload,
        }

    def dp(self, cluster: Cluster) -> int:
        """Data-parallel size. Only meaningful where `problems` finds none."""
        return cluster.trainer_devices // (self.tp * self.cp * self.pp)

    def copies(self, cluster: Cluster) -> int:
        """Ranks that hold the same weights, and share gradients and the optimizer's state: DP x CP."""
        return cluster.trainer_devices // (self.tp * self.pp)

    @property
    def rank_tokens(self) -> int:
        """Most tokens of a micro-batch on one rank, before sequence parallelism divides them."""
        return -(-self.micro_batch_tokens // self.cp)

    def overrides(self) -> list[str]:
        """The layout as key=value settings of `megatron-nft train`."""
        words = {None: "null", True: "true", False: "false"}
        return [
            f"policy.{name}={words[value] if value is None or isinstance(value, bool) else value}"
            for name, value in self._settings().items()
        ]

    def describe(self) -> str:
        """The layout in one line, for people."""
        parts = [f"TP {self.tp}", *[f"CP {self.cp}"] * (self.cp > 1), f"PP {self.pp}"]
        parts += [f"EP {self.ep}"] * (self.ep > 1)
        parts += [f"VPP {self.vpp}"] * (self.vpp > 1) + ["sequence parallel"] * self.sequence_parallel
        parts += [f"recompute {self.recompute}", f"{self.micro_batch_tokens} tokens per micro-batch"]
        return ", ".join(parts + ["optimizer on the host"] * self.offload)


def with_seq_len(config: Config, seq_len: int) -> Config:
    """The settings with questions and answers of at most `seq_len` tokens together. The micro-batch cap is raised where
    it would not hold them. ValueError where no token is left for the answer."""
    response = seq_len - config.data.max_prompt_tokens
    if response < 1:
        raise ValueError(
            f"--seq-len {seq_len} leaves no token for the answer after data.max_prompt_tokens "
            f"({config.data.max_prompt_tokens}); give a larger one"
        )
    policy = config.policy.model_copy(update={"micro_batch_tokens": max(config.policy.micro_batch_tokens, seq_len)})
    rollout = config.rollout.model_copy(update={"max_response_tokens": response})
    return config.model_copy(update={"policy": policy, "rollout": rollout})


def element_bytes(config: Config) -> int:
    """Bytes of one weight in the precision that trains."""
    return 2 if config.policy.precision == "bf16" else 4


def longest_sequence(config: Config) -> int:
    """Tokens of the longest question with the longest answer."""
    return config.data.max_prompt_tokens + config.rollout.max_response_tokens


def problems(spec: ModelSpec, config: Config, layout: LayoutSettings, cluster: Cluster) -> list[str]:
    """Every rule that the layout breaks, one line each; empty when it can run."""
    policy = layout.applied_to(config.policy)
    return [
        *_processes(policy, config, cluster),
        *split_problems(spec, policy),
        *_micro_batch(policy, config),
        *_fp8(spec, policy, cluster),
        *_engine(spec, config, cluster),
    ]


def _processes(policy: PolicyConfig, config: Config, cluster: Cluster) -> list[str]:
    """Say what is wrong with how the trainer's processes are divided over model-parallel sizes, nodes and answers."""
    problems, tp = [], policy.tensor_model_parallel_size
    if tp > cluster.devices_per_node:
        problems.append(
            f"tensor_model_parallel_size ({tp}) must stay inside a node ({cluster.devices_per_node} GPUs): "
            "its traffic needs NVLink"
        )
    plain = cluster.chip.name == "cpu" or policy.layer_spec == "local"
    if policy.context_parallel_size > 1 and policy.precision != "bf16" and not plain:
        problems.append(
            f"context_parallel_size ({policy.context_parallel_size}) needs precision=bf16 with Transformer Engine, not "
            f"{policy.precision}"
        )
    answers = config.train.questions_per_optimizer_step * config.rollout.answers_per_question
    try:
        replicas = policy.data_parallel_size(cluster.trainer_devices)
    except ValueError as error:
        return [*problems, str(error)]
    if replicas > answers:
        problems.append(
            f"{replicas} data-parallel replicas, but only {answers} answers per optimizer step: "
            "raise train.questions_per_optimizer_step or the model-parallel sizes"
        )
    return problems


def _micro_batch(policy: PolicyConfig, config: Config) -> list[str]:
    """Say whether the longest answer exceeds a micro-batch. Its positions are `policy.positions.check_positions`'s."""
    longest, multiple = longest_sequence(config), policy.token_multiple
    padded = -(-longest // multiple) * multiple
    if padded <= policy.micro_batch_tokens:
        return []
    return [
        f"micro_batch_tokens ({policy.micro_batch_tokens}) must hold the longest answer: {longest} tokens, "
        f"{padded} when padded to a multiple of {multiple}"
    ]


def _fp8(spec: ModelSpec, policy: PolicyConfig, cluster: Cluster) -> list[str]:
    recipe = policy.fp8.recipe
    if recipe == "none":
        return []
    chip = cluster.chip
    if recipe not in chip.fp8_recipes:
        allowed = ", ".join(("none", *chip.fp8_recipes))
        return [f"fp8.recipe={recipe}: {chip.name} does not have it; allowed there: {allowed}"]
    return size_problems(spec, recipe, policy.tensor_model_parallel_size, policy.expert_model_parallel_size)


def _engine(spec: ModelSpec, config: Config, cluster: Cluster) -> list[str]:
    if not config.rollout.uses_servers:
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
    """Every combination of TP, CP, PP, EP, VPP and recompute that obeys the rules, each as a list that uses less and
    less memory: with the micro-batch cap as set; with the smallest cap that holds an answer; with that cap and the
    optimizer on the host (GPUs only). VPP is 1 or the settings' own; CP is a power of two up to the devices of a node,
    or the settings' own.
    """
    current = LayoutSettings.of(config)
    tps = [t for t in range(1, cluster.devices_per_node + 1) if cluster.devices_per_node % t == 0]
    pps = [p for p in range(1, min(spec.num_layers, cluster.trainer_devices) + 1) if spec.num_layers % p == 0]
    ladders = []
    eps = [e for e in range(1, spec.num_experts + 1) if spec.num_experts % e == 0] or [1]
    cps = sorted({current.cp, *(c for c in (1, 2, 4, 8, 16) if c <= cluster.devices_per_node)})
    for tp, cp, pp, ep, recompute in itertools.product(tps, cps, pps, eps, ("none", "selective", "full")):
        for vpp in sorted({1, current.vpp if pp > 1 else 1}):
            first = replace(current, tp=tp, cp=cp, pp=pp, ep=ep, vpp=vpp, sequence_parallel=tp > 1, recompute=recompute)
            multiple = first.applied_to(config.policy).token_multiple
            smallest = -(-longest_sequence(config) // multiple) * multiple
            small = replace(first, micro_batch_tokens=min(smallest, first.micro_batch_tokens))
            steps = [first, small] + [replace(small, offload=True)] * (cluster.chip.name != "cpu")
            ladder = [step for step in dict.fromkeys(steps) if not problems(spec, config, step, cluster)]
            if ladder:
                ladders.append(ladder)
    return ladders
