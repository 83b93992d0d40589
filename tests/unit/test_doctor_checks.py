"""Each check of the doctor with both outcomes, on facts made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_nft.config import Config
from megatron_nft.engines.host import one_host_problem
from megatron_nft.engines.open import engine_kind
from megatron_nft.plan.doctor.checks import GIB, find_problems
from megatron_nft.plan.doctor.facts import Environment, Gpu, NodeFacts, engine_packages
from megatron_nft.plan.doctor.meeting import Answer, Meeting
from megatron_nft.plan.doctor.table import as_text
from megatron_nft.policy.family import ModelSpec, spec_from_config

PACKAGES = {"megatron-core": "0.16.1", "transformer-engine": "2.11.0"}
TRAINER = Environment("3.12.3", "2.11.0+cu130", "13.0", "2.28.9", [[9, 19, 0], [9, 19, 0]], PACKAGES)
ENGINE = Environment("3.12.3", "2.11.0+cu130", "13.0", "2.28.9", [[9, 19, 0]] * 2, {"sglang": "0.5.17"})
H100 = Gpu("NVIDIA H100 80GB HBM3", 512, 81559, "580.95")
NODE = NodeFacts(
    host="h1",
    version="0.2.0",
    ranks=8,
    cores=96,
    memory_bytes=900 * GIB,
    shared_memory_bytes=400 * GIB,
    gpus=[H100] * 8,
    trainer=TRAINER,
    engine=ENGINE,
    other_cudnns=[],
    missing_files=[],
    port_problem="",
)
CPU_NODE = replace(NODE, gpus=[], trainer=replace(TRAINER, cuda=None, nccl=None, cudnn=None), ranks=2)


def settings(**changes) -> Config:
    server = {"num_servers": 8, **changes.pop("server", {})}
    values = {"run_dir": "/shared/run", "model": {"path": "/m"}, "data": {"train": ["/q"]}}
    return Config.model_validate(values | {"rollout": {"engine": "sglang", "server": server}} | changes)


def problems(
    *nodes: NodeFacts,
    config: Config | None = None,
    num_nodes: int | None = None,
    spec: ModelSpec | None = None,
    **answers,
) -> list[str]:
    """(PROBLEM or warning) host: what, of each problem."""
    told = {n: replace(Answer(node, "held", (0.0, 0.0)), **answers.get(node.host, {})) for n, node in enumerate(nodes)}
    found = find_problems(config or settings(), Meeting(told, []), num_nodes or len(nodes), spec)
    assert all(p.mend for p in found)
    assert sorted(found, key=lambda p: not p.fatal) == found
    return [f"{'PROBLEM' if p.fatal else 'warning'} {p.where}: {p.what}" for p in found]


def second(**changes) -> NodeFacts:
    return replace(NODE, host="h2", **changes)


def third() -> NodeFacts:
    return replace(NODE, host="h3")


def test_good_nodes_have_no_problem():
    assert problems(NODE) == problems(NODE, second(), third()) == []
    assert problems(CPU_NODE, config=settings(server={"num_servers": 1})) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"version": "0.1.0"}, "megatron_nft is 0.1.0, on the other nodes 0.2.0"),
        ({"trainer": replace(TRAINER, python="3.11.7")}, "python is 3.11.7, on the other nodes 3.12.3"),
        ({"trainer": replace(TRAINER, torch="2.10.0")}, "torch is 2.10.0, on the other nodes 2.11.0+cu130"),
        ({"trainer": replace(TRAINER, cuda="12.8")}, "cuda is 12.8, on the other nodes 13.0"),
        ({"trainer": replace(TRAINER, nccl="2.27.3")}, "nccl is 2.27.3, on the other nodes 2.28.9"),
        ({"trainer": replace(TRAINER, cudnn=[[9, 19, 0], [9, 20, 1]])}, "cuDNN is 9.20.1, on the other nodes 9.19.0"),
        (
            {"trainer": replace(TRAINER, packages=PACKAGES | {"megatron-core": "0.15.0"})},
            "megatron-core is 0.15.0, on the other nodes 0.16.1",
        ),
        (
            {"engine": replace(ENGINE, packages={"sglang": "0.5.23"})},
            "the engine's sglang is 0.5.23, on the other nodes 0.5.17",
        ),
    ],
)
def test_another_version_on_one_node(changes, expected):
    assert f"PROBLEM h2: {expected}" in problems(NODE, second(**changes), third())
    assert f"PROBLEM h2: {expected}" not in problems(NODE, second(), third())


def test_another_driver_is_only_a_warning():
    other = second(gpus=[replace(H100, driver="570.10")] * 8)
    assert problems(NODE, other) == ["warning all nodes: drivers differ: h1 580.95, h2 570.10"]


def test_a_node_without_gpus_among_others():
    assert "PROBLEM h2: has no GPU, other nodes have" in problems(NODE, second(gpus=[]))


def test_nodes_that_do_not_share_the_folder():
    (absent,) = problems(NODE, num_nodes=3)
    assert absent == "PROBLEM 2 of 3 nodes: left no facts in the shared folder; h1 did"
    found = find_problems(
        settings(), Meeting({0: Answer(NODE, "held", (0, 0)), 1: Answer(second(), "held", (0, 0))}, [1]), 2
    )
    assert [(p.where, p.what) for p in found] == [("h2", "does not see what h1 writes to run_dir /shared/run")]


@pytest.mark.parametrize(
    ("lock", "expected"),
    [
        ("held", []),
        ("missing", ["warning h2: the file system of run_dir /shared/run has no flock"]),
        ("free", ["warning h2: locks on the file system of run_dir /shared/run do not reach other nodes"]),
    ],
)
def test_locks(lock, expected):
    assert problems(NODE, second(), h2={"lock": lock}) == expected


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ((-0.1, 0.2), []),
        ((-40.0, 1.0), []),  # nothing is known for sure: the file system took its time
        ((59.0, 61.0), ["warning h2: its clock is at least 59 s ahead of that of h1"]),
        ((-61.0, -58.6), ["warning h2: its clock is at least 59 s behind that of h1"]),
    ],
)
def test_clocks(bounds, expected):
    assert problems(NODE, second(), h2={"ahead_s": bounds}) == expected


def test_files_and_ports():
    node = second(missing_files=["data.train: /q"], port_problem="port 20017, at which the ranks meet: in use")
    assert problems(NODE, node) == [
        "PROBLEM h2: does not see data.train: /q",
        "PROBLEM h2: port 20017, at which the ranks meet: in use",
    ]


def test_environments_that_do_not_work():
    broken = Environment(problem="import torch: ImportError: libcudart.so.13")
    assert problems(replace(NODE, trainer=broken)) == [
        "PROBLEM h1: trainer: import torch: ImportError: libcudart.so.13"
    ]
    assert problems(replace(NODE, engine=broken)) == ["PROBLEM h1: engine: import torch: ImportError: libcudart.so.13"]
    empty = replace(ENGINE, packages={})
    assert problems(replace(NODE, engine=empty)) == ["PROBLEM h1: the engine's environment has no sglang"]
    with_router = settings(server={"router": True})
    assert problems(NODE, config=with_router) == ["PROBLEM h1: the engine's environment has no sglang-router"]
    whole = replace(ENGINE, packages={"sglang": "0.5.17", "sglang-router": "0.3.2"})
    assert problems(replace(NODE, engine=whole), config=with_router) == []
    no_cuda = replace(TRAINER, torch="2.13.0+cpu", cuda=None, nccl=None, cudnn=None)
    assert problems(replace(NODE, trainer=no_cuda)) == ["PROBLEM h1: torch 2.13.0+cpu is built without CUDA"]


@pytest.mark.parametrize(
    ("packages", "expected"),
    [
        ({}, "PROBLEM h1: the trainer's environment has no megatron-core"),
        ({"megatron-core": "0.16.1"}, "PROBLEM h1: the trainer's environment has no Transformer Engine"),
        (
            {"megatron-core": "0.16.1", "transformer-engine": "2.5.0"},
            "PROBLEM h1: Transformer Engine is 2.5.0; megatron-core 0.16.1 needs 2.9 or newer",
        ),
        (
            {"megatron-core": "0.16.1", "transformer-engine": "2.17.0"},
            "PROBLEM h1: megatron-core 0.16.1 with Transformer Engine 2.17.0 leaves experts out of the gradient norm "
            "(Megatron-LM #5916)",
        ),
        (
            {"megatron-core": "0.19.2", "transformer-engine": "2.17.0"},
            "warning h1: Python 3.12.3, megatron-core 0.19.2, torch 2.11.0+cu130, Transformer Engine 2.17.0 were not "
            "tested together",
        ),
    ],
)
def test_stacks_that_would_fail(packages, expected):
    node = replace(NODE, trainer=replace(TRAINER, packages=packages))
    assert expected in problems(node)
    assert problems(replace(node, ranks=0), config=settings(sync={"transport": "disk"})) == []  # engines alone


def test_layers_without_transformer_engine():
    node = replace(NODE, trainer=replace(TRAINER, packages={"megatron-core": "0.16.1"}))
    assert problems(node, config=settings(policy={"layer_spec": "local"})) == []


@pytest.mark.parametrize("name", ["sglang", "vllm"])
def test_what_brings_an_engine(name):
    assert engine_packages(name) == engine_kind(name).packages


def test_two_cudnns():
    trainer = replace(TRAINER, cudnn=[[9, 19, 0], [9, 14, 0]])
    node = replace(NODE, trainer=trainer, other_cudnns=["/usr/lib/libcudnn.so.9.14.0"])
    expected = "PROBLEM h1: torch was built for cuDNN 9.19.0 and loads 9.14.0 (/usr/lib/libcudnn.so.9.14.0)"
    assert problems(node) == [expected]
    beside = replace(NODE, other_cudnns=["/usr/lib/libcudnn.so.9.14.0"])
    assert problems(beside) == []
    assert "h1: beside torch's own cuDNN there is /usr/lib/libcudnn.so.9.14.0; it is not used" in as_text([beside], [])


def test_nccl_of_trainer_and_engine():
    node = replace(NODE, engine=replace(ENGINE, nccl="2.27.7"))
    text = "h1: NCCL is 2.28.9 in the trainer and 2.27.7 in the engine"
    assert problems(node) == [f"warning {text}"]
    assert problems(node, config=settings(sync={"transport": "distributed"})) == [f"PROBLEM {text}"]
    assert problems(replace(node, ranks=0)) == [f"PROBLEM {text}"]  # nodes of engines alone get weights over NCCL


def test_gpus():
    assert problems(replace(NODE, ranks=16)) == ["PROBLEM h1: 16 ranks, but 8 GPUs"]
    full = [H100] * 7 + [replace(H100, used_mib=20480)]
    assert problems(replace(NODE, gpus=full)) == ["PROBLEM h1: GPU 7: 20.0 of 80 GiB are taken"]
    (across,) = problems(NODE, config=settings(server={"num_servers": 1, "tensor_parallel_size": 16}))
    assert across.startswith(
        "PROBLEM h1: rollout.server: 1 servers x tensor_parallel_size 16 = 16 GPUs, but this host has 8"
    )


@pytest.mark.parametrize(
    ("given", "gpus", "problem"),
    [
        ({"num_servers": 4, "tensor_parallel_size": 2}, 8, ""),
        ({"num_servers": 4, "tensor_parallel_size": 2}, 0, ""),  # a CPU
        ({"num_servers": 4, "tensor_parallel_size": 4}, 8, "= 16 GPUs, but this host has 8"),
        ({"extra_args": ["--nnodes=2"]}, 8, "--nnodes=2 joins servers of several hosts"),
        ({"extra_args": ["--dist_init_addr", "h1:5000"]}, 0, "--dist_init_addr joins servers of several hosts"),
        ({"extra_args": ["--attention-backend=fa3"]}, 8, ""),
    ],
)
def test_an_engine_across_hosts_is_refused(given, gpus, problem):
    found = one_host_problem(settings(server={"num_servers": 1, **given}).rollout.server, gpus)
    assert problem in found and bool(problem) == bool(found)


def test_cores_and_memory():
    assert problems(replace(NODE, cores=1)) == ["warning h1: 1 usable cores for 8 ranks"]
    assert problems(replace(NODE, cores=8)) == []
    (memory,) = problems(replace(NODE, memory_bytes=20 * GIB))  # 8 ranks of 1 GiB, 8 servers of 2
    assert memory.startswith("PROBLEM h1: 20.0 GiB of memory are free; 8 ranks and 8 servers take 24 before")
    assert "the checkpoint copies" not in memory
    small = replace(CPU_NODE, shared_memory_bytes=64 << 20)
    config = settings(server={"num_servers": 1}, sync={"bucket_bytes": 512 << 20})
    assert problems(small, config=config) == ["PROBLEM h1: /dev/shm has 0.06 GiB left, a weight sync fills 1.00"]
    assert problems(replace(small, shared_memory_bytes=2 * GIB), config=config) == []


LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}


def test_copies_for_checkpoints_are_part_of_a_hosts_memory():
    """70.57 billion parameters (vocabulary padded to 129,024) of 14 bytes over 16 ranks: 460 GiB on a node of 8."""
    spec, both = spec_from_config(LLAMA_70B), (NODE, second())
    given = {"policy": {"tensor_model_parallel_size": 8}}
    enough, short = ([replace(node, memory_bytes=free * GIB) for node in both] for free in (490, 480))
    assert problems(*enough, config=settings(**given), spec=spec) == []
    told = problems(*short, config=settings(**given), spec=spec)
    assert [line.split(":")[0] for line in told] == ["PROBLEM h1", "PROBLEM h2"]
    assert told[0].endswith("8 ranks and 8 servers take 24 before they hold a model, the checkpoint copies 460.0")
    at_once = settings(**given, checkpoint={"asynchronous": False})
    assert problems(*short, config=at_once, spec=spec) == []
    offload = settings(policy={**given["policy"], "optimizer_offload": True}, checkpoint={"asynchronous": False})
    assert problems(*short, config=offload, spec=spec) == []  # 394.3 GiB of Adam's state, 12 bytes each
    less = [replace(node, memory_bytes=400 * GIB) for node in both]
    assert problems(*less, config=offload, spec=spec)[0].endswith("a model, the optimizer 394.3")
    undivided = settings(policy={"tensor_model_parallel_size": 3})
    assert problems(*short, config=undivided, spec=spec) == [], "the run itself refuses such a layout"


def test_deep_checks():
    node = replace(NODE, deep={"Transformer Engine": "", "sglang server": "did not answer within 300 s"})
    assert problems(node) == ["PROBLEM h1: sglang server: did not answer within 300 s"]
    assert "h1: Transformer Engine: works" in as_text([node], [])


def test_the_page():
    found = find_problems(
        settings(), Meeting({0: Answer(NODE, "held", (0, 0)), 1: Answer(second(cores=1), "missing", (0, 0))}, []), 2
    )
    lines = as_text([NODE, second(cores=1)], found).splitlines()
    assert " ".join(lines[0].split()) == "node GPUs ranks cores memory python torch CUDA NCCL cuDNN engine"
    versions = "3.12.3 2.11.0+cu130 13.0 2.28.9 9.19.0 sglang 0.5.17"
    assert " ".join(lines[1].split()) == f"h1 8 x NVIDIA H100 80GB HBM3 8 96 900 GiB {versions}"
    assert [line.split(":")[0] for line in lines[3:5]] == ["warning  h2", "warning  h2"]
    assert lines[-1] == "doctor: 2 nodes; nothing that would stop the run was found, 2 warnings"
    assert as_text(
        [NODE], find_problems(settings(), Meeting({0: Answer(replace(NODE, ranks=9), "held", (0, 0))}, []), 1)
    ).endswith("doctor: 1 node; the run would fail: 1 problem")
