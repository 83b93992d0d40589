"""What would stop the run, or slow it down, judged from the facts of all nodes. Pure: facts in, problems out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from packaging.version import Version

from megatron_nft.config import Config
from megatron_nft.engines.host import one_host_problem
from megatron_nft.plan.doctor.facts import Environment, NodeFacts, engine_packages, starts_servers
from megatron_nft.plan.doctor.meeting import Meeting
from megatron_nft.plan.hardware import CHIPS
from megatron_nft.plan.layout import Cluster, LayoutSettings, problems
from megatron_nft.plan.memory import host_bytes_per_node
from megatron_nft.policy.cudnn import fits_torch
from megatron_nft.policy.family import ModelSpec
from megatron_nft.policy.stack import MIN_TRANSFORMER_ENGINE, Stack, check_stack, untested

GIB = 1 << 30
RANK_BYTES = GIB  # of a process that has imported torch, megatron-core and transformers, with its graders
SERVER_BYTES = 2 * GIB
GPU_USED_MIB = 2048  # of a GPU that nobody uses: driver and display
CLOCK_S = 5.0  # apart from which logs and file times of nodes mislead


@dataclass(frozen=True)
class Problem:
    """One line for a person."""

    where: str  # host, or hosts
    what: str
    mend: str
    fatal: bool = True  # the run would fail; else it may be slow or hard to follow


def find_problems(config: Config, meeting: Meeting, num_nodes: int, spec: ModelSpec | None = None) -> list[Problem]:
    """All problems, the fatal ones first. Without `spec` what the model takes of a host's memory is not counted."""
    nodes = [answer.facts for _, answer in sorted(meeting.answers.items())]
    found = [*_of_meeting(config, meeting, num_nodes), *_differences(nodes)]
    for node in nodes:
        for check in (_files, _software, _gpus, _cores, _deep):
            found += check(config, node)
        found += _memory(config, node, _held_on_host(config, spec, nodes))
    return sorted(found, key=lambda problem: not problem.fatal)


def _of_meeting(config: Config, meeting: Meeting, num_nodes: int) -> Iterator[Problem]:
    first = meeting.answers[0].facts.host
    if absent := num_nodes - len(meeting.answers):
        came = ", ".join(answer.facts.host for answer in meeting.answers.values())
        yield Problem(
            f"{absent} of {num_nodes} nodes",
            f"left no facts in the shared folder; {came} did",
            f"run_dir {config.run_dir} has to be on a file system that all nodes see; see the nodes' own output",
        )
    for number in meeting.silent:
        yield Problem(
            meeting.answers[number].facts.host,
            f"does not see what {first} writes to run_dir {config.run_dir}",
            "look at the file system's cache (mount option noac or actimeo of NFS)",
        )
    for answer in meeting.answers.values():
        host, (low, high) = answer.facts.host, answer.ahead_s
        if answer.lock == "missing":
            yield Problem(
                host,
                f"the file system of run_dir {config.run_dir} has no flock",
                "a lease that is renewed takes its place; mount it with flock (Lustre: -o flock) to do without",
                fatal=False,
            )
        elif answer.lock == "free":
            yield Problem(
                host,
                f"locks on the file system of run_dir {config.run_dir} do not reach other nodes",
                "nothing keeps two runs out of one run_dir: mount it with flock instead of localflock or local_lock",
                fatal=False,
            )
        if low > CLOCK_S or high < -CLOCK_S:
            apart = low if low > 0 else -high
            yield Problem(
                host,
                f"its clock is at least {apart:.0f} s {'ahead of' if low > 0 else 'behind'} that of {first}",
                "set it by NTP (chronyc tracking)",
                fatal=False,
            )


def _versions(node: NodeFacts) -> dict[str, str | None]:
    named: dict[str, str | None] = {"megatron_nft": node.version}
    for prefix, environment in (("", node.trainer), ("the engine's ", node.engine)):
        if environment is not None and not environment.problem:
            named |= {f"{prefix}{n}": getattr(environment, n) for n in ("python", "torch", "cuda", "nccl")}
            named |= {f"{prefix}{n}": version for n, version in environment.packages.items()}
            if environment.cudnn:
                named[f"{prefix}cuDNN"] = _dotted(environment.cudnn[1])
    return named


def _differences(nodes: Sequence[NodeFacts]) -> Iterator[Problem]:
    """Software that is not the same on all nodes; most nodes are taken to be right."""
    versions = [_versions(node) for node in nodes]
    for name in dict.fromkeys(name for found in versions for name in found):
        counts = Counter(found[name] for found in versions if name in found)
        usual = counts.most_common(1)[0][0]
        for node, found in zip(nodes, versions, strict=True):
            if name in found and found[name] != usual:
                yield Problem(
                    node.host,
                    f"{name} is {found[name]}, on the other nodes {usual}",
                    "give all nodes the same environment (NFT_PYTHON, rollout.server.python, the container's image)",
                )
    drivers = {node.host: {gpu.driver for gpu in node.gpus} for node in nodes if node.gpus}
    if len(set(map(frozenset, drivers.values()))) > 1:
        each = ", ".join(f"{host} {' '.join(sorted(found))}" for host, found in drivers.items())
        yield Problem("all nodes", f"drivers differ: {each}", "ask the site to update the nodes", fatal=False)
    if drivers and (without := [node.host for node in nodes if not node.gpus]):
        yield Problem(
            ", ".join(without), "has no GPU, other nodes have", "see nvidia-smi there, or leave it out (--exclude)"
        )


def _files(config: Config, node: NodeFacts) -> Iterator[Problem]:
    for missing in node.missing_files:
        yield Problem(
            node.host, f"does not see {missing}", "put it where all nodes see it (container: NFT_CONTAINER_MOUNTS)"
        )
    if node.port_problem:
        yield Problem(
            node.host, node.port_problem, "end what uses it, or submit again: the port follows from the job's id"
        )


def _software(config: Config, node: NodeFacts) -> Iterator[Problem]:
    for name, environment in (("trainer", node.trainer), ("engine", node.engine)):
        if environment is not None and environment.problem:
            yield Problem(
                node.host, f"{name}: {environment.problem}", "install it anew (README.md, tools/install_engine.sh)"
            )
    if node.trainer.problem:
        return
    if node.gpus and node.trainer.cudnn and not fits_torch(*map(tuple, node.trainer.cudnn)):
        built, loaded = map(_dotted, node.trainer.cudnn)
        beside = f" ({', '.join(node.other_cudnns)})" if node.other_cudnns else ""
        yield Problem(
            node.host,
            f"torch was built for cuDNN {built} and loads {loaded}{beside}",
            "take the other cuDNN out of LD_LIBRARY_PATH and LD_PRELOAD",
        )
    if node.gpus and node.trainer.cuda is None:
        yield Problem(node.host, f"torch {node.trainer.torch} is built without CUDA", "install a build with CUDA")
    elif node.ranks:
        yield from _stack(config, node)
    yield from _engine(config, node)


def _stack(config: Config, node: NodeFacts) -> Iterator[Problem]:
    """megatron-core and Transformer Engine of a node with ranks."""
    core, engine = (node.trainer.packages.get(name) for name in ("megatron-core", "transformer-engine"))
    if core is None:
        yield Problem(node.host, "the trainer's environment has no megatron-core", "install it anew (README.md)")
        return
    if node.gpus and config.policy.layer_spec != "local":
        mend = "install the extra `te` (docs/cluster.md), or set policy.layer_spec=local"
        if engine is None:
            yield Problem(node.host, "the trainer's environment has no Transformer Engine", mend)
        elif Version(engine) < Version(MIN_TRANSFORMER_ENGINE):
            what = f"Transformer Engine is {engine}; megatron-core {core} needs {MIN_TRANSFORMER_ENGINE} or newer"
            yield Problem(node.host, what, mend)
    stack = Stack(node.trainer.python, core, node.trainer.torch, engine)
    try:
        check_stack(stack)
    except ValueError as e:
        what, _, mend = str(e).partition(": ")
        yield Problem(node.host, what, mend)
    else:
        if said := untested(stack):
            yield Problem(node.host, said, "docs/cluster.md names what was", fatal=False)


def _engine(config: Config, node: NodeFacts) -> Iterator[Problem]:
    engine, wanted = node.engine, config.rollout.engine
    if engine is None or engine.problem:
        return
    if not any(name in engine.packages for name in engine_packages(wanted)):
        yield Problem(
            node.host,
            f"the engine's environment has no {wanted}",
            f"bash tools/install_engine.sh {wanted}, or set rollout.server.python",
        )
    if config.rollout.server.router and "sglang-router" not in engine.packages:
        yield Problem(
            node.host,
            "the engine's environment has no sglang-router",
            "bash tools/install_engine.sh sglang, or rollout.server.router=false",
        )
    if node.gpus and engine.nccl and node.trainer.nccl and engine.nccl != node.trainer.nccl:
        together = config.sync.transport == "distributed" or (config.sync.transport == "auto" and node.ranks == 0)
        yield Problem(
            node.host,
            f"NCCL is {node.trainer.nccl} in the trainer and {engine.nccl} in the engine",
            "install the same nvidia-nccl package in both"
            if together
            else "no matter to sync.transport=tensor or disk; sync.transport=distributed needs the same in both",
            fatal=together,
        )


def _gpus(config: Config, node: NodeFacts) -> Iterator[Problem]:
    if starts_servers(config, node.ranks) and (problem := one_host_problem(config.rollout.server, len(node.gpus))):
        yield Problem(node.host, problem, "lower rollout.server.num_servers or rollout.server.tensor_parallel_size")
    if not node.gpus:
        return
    if node.ranks > len(node.gpus):
        yield Problem(
            node.host,
            f"{node.ranks} ranks, but {len(node.gpus)} GPUs",
            f"NFT_PROCS_PER_NODE={len(node.gpus)} (or num_processes), or ask Slurm for more",
        )
    for number, gpu in enumerate(node.gpus):
        if gpu.used_mib > GPU_USED_MIB:
            yield Problem(
                node.host,
                f"GPU {number}: {gpu.used_mib / 1024:.1f} of {gpu.total_mib / 1024:.0f} GiB are taken",
                "end what holds them (nvidia-smi), or leave the node out (--exclude)",
            )


def _cores(config: Config, node: NodeFacts) -> Iterator[Problem]:
    if node.cores < node.ranks:
        yield Problem(
            node.host,
            f"{node.cores} usable cores for {node.ranks} ranks",
            "ask for more (sbatch --cpus-per-task), or let srun not bind them (--cpu-bind=none, as the scripts do)",
            fatal=False,
        )


def _held_on_host(config: Config, spec: ModelSpec | None, nodes: Sequence[NodeFacts]) -> dict[str, int]:
    """Bytes by part that the trainer's ranks of a node keep in its memory beside the GPUs'; nothing where the layout
    does not fit the nodes, which the run itself refuses."""
    ranks = max(node.ranks for node in nodes)
    if spec is None or not ranks:
        return {}
    cluster = Cluster(CHIPS["h100"], sum(node.ranks > 0 for node in nodes), ranks)  # no chip has a part in it
    layout = LayoutSettings.of(config)
    return {} if problems(spec, config, layout, cluster) else host_bytes_per_node(spec, config, layout, cluster)


def _memory(config: Config, node: NodeFacts, held: Mapping[str, int]) -> Iterator[Problem]:
    servers = config.rollout.server.num_servers if starts_servers(config, node.ranks) else 0
    needed, held = node.ranks * RANK_BYTES + servers * SERVER_BYTES, held if node.ranks else {}
    if node.memory_bytes < needed + sum(held.values()):
        more = "".join(f", the {part} {nbytes / GIB:.1f}" for part, nbytes in held.items() if nbytes)
        without = ", or set checkpoint.asynchronous=false" if held.get("checkpoint copies") else ""
        yield Problem(
            node.host,
            f"{node.memory_bytes / GIB:.1f} GiB of memory are free; {node.ranks} ranks and {servers} servers take "
            f"{needed / GIB:.0f} before they hold a model{more}",
            f"ask Slurm for all of it (--mem=0), or end what else runs there{without}",
        )
    buckets = 2 * config.sync.bucket_bytes
    if servers and config.sync.transport in ("auto", "tensor") and not node.gpus and node.shared_memory_bytes < buckets:
        yield Problem(
            node.host,
            f"/dev/shm has {node.shared_memory_bytes / GIB:.2f} GiB left, a weight sync fills {buckets / GIB:.2f}",
            "enlarge it (docker: --shm-size), or lower sync.bucket_bytes",
        )


def _deep(config: Config, node: NodeFacts) -> Iterator[Problem]:
    for name, problem in node.deep.items():
        if problem:
            yield Problem(node.host, f"{name}: {problem}", 'see docs/cluster.md, "What the doctor checks"')


def _dotted(numbers: Sequence[int]) -> str:
    return ".".join(map(str, numbers))


SHOWN: dict[str, Callable[[NodeFacts], str]] = {
    "node": lambda node: node.host,
    "GPUs": lambda node: f"{len(node.gpus)} x {node.gpus[0].name}" if node.gpus else "none",
    "ranks": lambda node: str(node.ranks),
    "cores": lambda node: str(node.cores),
    "memory": lambda node: f"{node.memory_bytes / GIB:.0f} GiB",
    "python": lambda node: node.trainer.python or "?",
    "torch": lambda node: _both(node, lambda e: e.torch),
    "CUDA": lambda node: _both(node, lambda e: e.cuda or "none"),
    "NCCL": lambda node: _both(node, lambda e: e.nccl or "none"),
    "cuDNN": lambda node: _cudnn(node),
    "engine": lambda node: _engine_name(node.engine),
}
"""Columns of the table."""


def _both(node: NodeFacts, value: Callable[[Environment], str]) -> str:
    """The trainer's, and the engine's where it is another."""
    names = [value(e) or "?" for e in (node.trainer, node.engine) if e is not None]
    return " / ".join(dict.fromkeys(names))


def _cudnn(node: NodeFacts) -> str:
    if not node.trainer.cudnn:
        return "none"
    built, loaded = map(_dotted, node.trainer.cudnn)
    return loaded if built == loaded else f"{loaded} for {built}"


def _engine_name(engine: Environment | None) -> str:
    if engine is None:
        return "none here"
    return next((f"{n} {v}" for n, v in engine.packages.items() if n != "sglang-router"), "?")
