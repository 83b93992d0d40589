"""Memory of one device by part, in the three phases that a device goes through: train, sync and generate.

weights     e bytes per parameter of the rank (e = 2 in bf16, 4 in fp32); FP8 adds one byte for each of the two
            layouts in which Transformer Engine caches a quantized matrix
gradients   4 bytes per parameter: Megatron's DDP buffer is fp32
optimizer   Adam's two moments in fp32, 8 bytes, and in bf16 the fp32 master weights, 4 more; over `dp` x `cp` ranks
            with the distributed optimizer
activations `activations.py`, times the tokens of a micro-batch over CP, and the micro-batches in flight:
            min(pp - stage, m) for 1F1B, and for the interleaved schedule
            min(2 (pp - stage - 1) + (vpp - 1) pp + 1, m vpp) chunks (Megatron's warm-up count)
logits      logprob_chunk_tokens C x V/tp: the head's output e, its fp32 copy 4, one fp32 temporary 4, the gradient e;
            the fp32 gradient of the output weight 4 h V/tp and its e-byte copy; and T h e each for the hidden states
            (whole, also under sequence parallel) and their gradient. In bf16 on a GPU (policy/logprobs_triton.py): half
            as many logits, in fp32, and their gradient e; the weight's gradient e h V/tp alone; and T h 4 more
average     algorithm.reference=ema: 4 bytes per parameter of the optimizer's share
engine      `engine.py`. With rollout.server.memory_saver its working memory alone stays in the training phase, and at
            sleep_level kv_cache its weights
copies      what a rank writes of its parameters into a checkpoint (weights e, Adam's state and master weights 12, the
            average 4), over the same ranks as the optimizer; in host memory, which on a CPU is the device's
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_nft.config import Config
from megatron_nft.plan.activations import cpu_ends, cpu_layer, gpu_layer, packed_attention_workspace
from megatron_nft.plan.architecture import (
    dense_params,
    embedding_params,
    local_expert_params,
    local_layer_matrices,
    total_params,
)
from megatron_nft.plan.engine import EngineMemory, engine_memory, shares_device
from megatron_nft.plan.layout import Cluster, LayoutSettings, element_bytes
from megatron_nft.policy.family import ModelSpec

PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "average weights",
    "checkpoint copies",
    "activations",
    "logits chunk",
    "packed attention",
    "export buckets",
    "engine weights",
    "engine KV cache",
    "engine working",
    "reserve",
)


@dataclass
class DeviceMemory:
    """Bytes on one device: `phases[phase][part]`, without the parts that a phase does not have."""

    role: str
    capacity: int
    phases: dict[str, dict[str, int]] = field(default_factory=dict)

    def total(self, phase: str) -> int:
        return sum(self.phases[phase].values())

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> int:
        return self.total(self.peak_phase)

    @property
    def largest_part(self) -> str:
        """The part that takes most in the fullest phase."""
        parts = self.phases[self.peak_phase]
        return max(parts, key=lambda part: parts[part])

    @property
    def fits(self) -> bool:
        return self.peak <= self.capacity


def optimizer_shard(spec: ModelSpec, config: Config, layout: LayoutSettings, cluster: Cluster, stage: int) -> int:
    """Number of parameters whose Adam state a rank of `stage` holds: its share of those that several ranks hold."""
    dense = dense_params(spec, layout.tp, layout.pp, stage)
    experts = local_expert_params(spec, layout.tp, layout.pp, layout.ep)
    if not config.policy.use_distributed_optimizer:
        return dense + experts
    expert_replicas = cluster.trainer_devices // (layout.pp * (layout.ep if layout.ep > 1 else layout.tp))
    return -(-dense // layout.copies(cluster)) - (-experts // expert_replicas)


def optimizer_bytes(spec: ModelSpec, config: Config, layout: LayoutSettings, cluster: Cluster, stage: int) -> int:
    """Bytes of Adam's state on one rank of `stage`."""
    return optimizer_shard(spec, config, layout, cluster, stage) * (12 if config.policy.precision == "bf16" else 8)


def checkpoint_copy_bytes(spec: ModelSpec, config: Config, layout: LayoutSettings, cluster: Cluster, stage: int) -> int:
    """Bytes of host memory from which a rank of `stage` writes checkpoints beside the training; 0 where it does not."""
    if not config.checkpoint.asynchronous:
        return 0
    written = optimizer_shard(spec, config, layout, cluster, stage)
    if spec.tied and 0 < stage == layout.pp - 1:  # the first stage writes the embedding that both keep
        ranks = layout.copies(cluster) if config.policy.use_distributed_optimizer else 1
        written -= spec.padded_vocab_size(layout.tp) * spec.hidden_size // layout.tp // ranks
    average = 0 if config.algorithm.average_decay is None else 4
    return written * (element_bytes(config) + 12 + average)


def in_flight_layers(spec: ModelSpec, layout: LayoutSettings, stage: int, num_micro_batches: int) -> int:
    """Layers x micro-batches whose activations stage `stage` keeps at its fullest."""
    pp, vpp = layout.pp, layout.vpp
    if vpp == 1:
        return min(pp - stage, num_micro_batches) * (spec.num_layers // pp)
    chunks = min(2 * (pp - stage - 1) + (vpp - 1) * pp + 1, num_micro_batches * vpp)
    return chunks * (spec.num_layers // (pp * vpp))


def _training(
    spec: ModelSpec, config: Config, layout: LayoutSettings, cluster: Cluster, stage: int, num_micro_batches: int
) -> dict[str, int]:
    """Return the parts that only the training phase has. The CPU spec has no separate workspaces."""
    tokens, e = layout.rank_tokens, element_bytes(config)
    on_cpu = cluster.chip.name == "cpu" or config.policy.layer_spec == "local"
    fp8 = config.policy.fp8.recipe != "none"
    layer = cpu_layer(spec, layout, e) if on_cpu else gpu_layer(spec, layout, fp8)
    kept = layer.kept[layout.recompute] * in_flight_layers(spec, layout, stage, num_micro_batches)
    ends = cpu_ends(spec, layout, e, stage) if on_cpu else 0
    parts = {"activations": int(tokens * (kept + ends + layer.recomputed[layout.recompute] + layer.gradients))}
    if not on_cpu:
        parts["packed attention"] = int(tokens * packed_attention_workspace(spec, layout))
    if stage == layout.pp - 1:
        rows, vocab = min(config.policy.logprob_chunk_tokens, tokens), spec.padded_vocab_size(layout.tp) // layout.tp
        if on_cpu or e == 4:
            chunk = rows * vocab * (2 * e + 8) + spec.hidden_size * vocab * (4 + e)
        else:
            chunk = rows * vocab // 2 * (4 + e) + spec.hidden_size * vocab * e + 4 * tokens * spec.hidden_size
        parts["logits chunk"] = chunk + 2 * tokens * spec.hidden_size * e
    return parts


def export_bytes(spec: ModelSpec, config: Config, layout: LayoutSettings) -> int:
    """Bytes on a stage leader: two buckets, and buffers for shards in transit or a parameter larger than a bucket."""
    e = element_bytes(config)
    largest = max(embedding_params(spec), 2 * spec.hidden_size * spec.ffn_hidden_size * (not spec.num_experts)) * e
    gathers = layout.tp > 1 or layout.ep > 1 or largest > config.sync.bucket_bytes
    return min(2 * config.sync.bucket_bytes, total_params(spec) * e) + largest * gathers


def resident(spec: ModelSpec, config: Config, layout: LayoutSettings, cluster: Cluster, stage: int) -> dict[str, int]:
    """Bytes by part that a rank of `stage` keeps in every phase."""
    params = dense_params(spec, layout.tp, layout.pp, stage)
    params += local_expert_params(spec, layout.tp, layout.pp, layout.ep)
    quantized = local_layer_matrices(spec, layout.tp, layout.pp, layout.ep)
    fp8_copies = 2 * quantized if config.policy.fp8.recipe != "none" else 0
    parts = {
        "weights": params * element_bytes(config) + fp8_copies,
        "gradients": params * 4,
        "optimizer": 0 if layout.offload else optimizer_bytes(spec, config, layout, cluster, stage),
    }
    if config.algorithm.average_decay is not None:
        parts["average weights"] = 4 * optimizer_shard(spec, config, layout, cluster, stage)
    return parts


def engine_beside_trainer(spec: ModelSpec, config: Config, layout: LayoutSettings, cluster: Cluster) -> EngineMemory:
    """An engine where the settings put it; on the trainer's devices it gets what the fullest stage leaves."""
    held = 0
    if shares_device(config, cluster):
        held = max(sum(resident(spec, config, layout, cluster, stage).values()) for stage in range(layout.pp))
    return engine_memory(spec, config, cluster.chip, held)


def sync_bytes_beside_engine(spec: ModelSpec, config: Config, layout: LayoutSettings, cluster: Cluster) -> int:
    """Bytes that a weight sync takes on a device of an engine."""
    if shares_device(config, cluster):
        return export_bytes(spec, config, layout)
    return min(config.sync.bucket_bytes, total_params(spec) * element_bytes(config))


def _engine_phases(config: Config, engine: EngineMemory) -> dict[str, dict[str, int]]:
    """What an engine on the trainer's device holds there, by phase."""
    weights, cache = {"engine weights": engine.weights}, {"engine KV cache": engine.kv_cache}
    if not config.rollout.uses_servers:  # the embedded engine allocates its cache per generation and gives it back
        return {"train": weights, "sync": weights, "generate": weights | cache}
    server, working = config.rollout.server, {"engine working": engine.working}
    awake = weights | cache | working
    asleep = working | (weights if server.sleep_level == "kv_cache" else {})
    return {"train": asleep if server.memory_saver else awake, "sync": awake, "generate": awake}


def trainer_memory(
    spec: ModelSpec, config: Config, layout: LayoutSettings, cluster: Cluster, num_micro_batches: int
) -> list[DeviceMemory]:
    """One entry per pipeline stage."""
    engine: dict[str, dict[str, int]] = {}
    if shares_device(config, cluster):
        engine = _engine_phases(config, engine_beside_trainer(spec, config, layout, cluster))
    devices = []
    for stage in range(layout.pp):
        parts = {
            "train": _training(spec, config, layout, cluster, stage, num_micro_batches),
            "sync": {"export buckets": export_bytes(spec, config, layout)},
            "generate": {},
        }
        always = resident(spec, config, layout, cluster, stage) | {"reserve": cluster.chip.reserve_bytes}
        if cluster.chip.name == "cpu":
            always["checkpoint copies"] = checkpoint_copy_bytes(spec, config, layout, cluster, stage)
        devices.append(
            DeviceMemory(
                role=f"pipeline stage {stage}" if layout.pp > 1 else "every device",
                capacity=cluster.chip.memory_bytes,
                phases={phase: always | engine.get(phase, {}) | own for phase, own in parts.items()},
            )
        )
    return devices


def engine_device(spec: ModelSpec, config: Config, layout: LayoutSettings, cluster: Cluster) -> DeviceMemory | None:
    """A device of an engine node; None when engines share the trainer's devices."""
    if not cluster.engine_nodes:
        return None
    engine = engine_memory(spec, config, cluster.chip)
    held = _engine_phases(config, engine)["generate"] | {"reserve": cluster.chip.reserve_bytes}
    bucket = {"export buckets": sync_bytes_beside_engine(spec, config, layout, cluster)}
    return DeviceMemory("engine nodes", cluster.chip.memory_bytes, {"sync": held | bucket, "generate": held})


def host_bytes_per_node(spec: ModelSpec, config: Config, layout: LayoutSettings, cluster: Cluster) -> dict[str, int]:
    """Bytes by part in the host memory of a node with the fullest ranks, for as long as the run lasts."""
    stages, ranks = range(layout.pp), cluster.devices_per_node
    offloaded = max(optimizer_bytes(spec, config, layout, cluster, stage) for stage in stages) if layout.offload else 0
    copies = max(checkpoint_copy_bytes(spec, config, layout, cluster, stage) for stage in stages)
    return {"optimizer": offloaded * ranks, "checkpoint copies": copies * ranks}
