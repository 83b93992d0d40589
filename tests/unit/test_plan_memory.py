"""The planner's memory against real counts on a CPU: what autograd keeps, what Megatron allocates."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

torch = pytest.importorskip("torch")
import tiny  # noqa: E402
from objectives import Objective  # noqa: E402

from megatron_nft.algorithms import read_settings  # noqa: E402
from megatron_nft.config import Config  # noqa: E402
from megatron_nft.data.packing import pack  # noqa: E402
from megatron_nft.plan import memory  # noqa: E402
from megatron_nft.plan.activations import cpu_ends, cpu_layer  # noqa: E402
from megatron_nft.plan.architecture import dense_params, read_architecture  # noqa: E402
from megatron_nft.plan.hardware import CHIPS  # noqa: E402
from megatron_nft.plan.layout import Cluster, LayoutSettings  # noqa: E402
from megatron_nft.policy import cpu, parallel  # noqa: E402
from megatron_nft.policy.context_parallel import TokenSplit  # noqa: E402
from megatron_nft.policy.model import packed_params  # noqa: E402
from megatron_nft.policy.policy import Policy  # noqa: E402
from megatron_nft.types import TrainingSample  # noqa: E402

LENGTHS = (256, 128, 64, 64)  # widths that the CPU attention does not pad
SIZES = {"hidden": 128, "layers": 3, "heads": 8, "kv_heads": 2, "ffn": 320, "vocab": 512}


def make(folder: Path, family: str, tied: bool = False, **policy) -> tuple[Config, Policy]:
    tiny.make_model(folder, family, tied=tied, **SIZES)
    return open_policy(folder, **policy)


@pytest.fixture(scope="module", autouse=True)
def ranks_are_left():
    """Other files of this process join ranks of their own."""
    yield
    parallel.shutdown()


def open_policy(folder: Path, **policy) -> tuple[Config, Policy]:
    """The model in `folder` on this rank, all weights 0.01."""
    config = Config.model_validate(
        {
            "run_dir": folder / "run",
            "model": {"path": folder},
            "data": {"train": ["unused"], "max_prompt_tokens": 16},
            "rollout": {"max_response_tokens": 16},
            "policy": {"micro_batch_tokens": sum(LENGTHS), **policy},
        }
    )
    layout = parallel.initialize(config.policy, 0)
    chosen = Policy.create(config, read_architecture(config.model), layout)
    with torch.no_grad():
        for parameter in chosen.chunks[0].parameters():
            parameter.fill_(0.01)
    chosen.reload_master_weights()
    return config, chosen


def batch(multiple_of: int = 1):
    samples = []
    for n in LENGTHS:
        nothing = np.zeros(n - 1, dtype=np.float32)
        ids = np.arange(n, dtype=np.int32)
        samples.append(TrainingSample(0, 0, ids, 1, nothing, nothing, correct=True, correct_rate=0.5))
    return pack(samples, range(len(samples)), multiple_of=multiple_of)


plain_loss = Objective(lambda logprobs, packed: -logprobs)


def kept_bytes(policy: Policy) -> int:
    """Bytes of all storages that autograd keeps after the forward pass of this rank's tokens, parameters left out, and
    the masks of chunks, which the plan does not count."""
    weights = {p.untyped_storage().data_ptr() for p in policy.chunks[0].parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    packed = batch()
    split = TokenSplit.of(packed.cu_seqlens, policy.layout.cp)
    params = packed_params(packed, False, split)
    policy.wrapped[0].train()
    with cpu.on_cpu(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tokens, positions = split.own(packed.tokens), split.own(packed.position_ids)
        out = policy.wrapped[0](tokens[None], positions[None], None, packed_seq_params=params)
        assert out.requires_grad
        # The output layer keeps its input; chunked log-probs keep little else.
        kept[out.untyped_storage().data_ptr()] = out.untyped_storage()
    masks = sum(b.mask.numel() for b in params.plan.batches if b.mask is not None) * out.element_size()
    return sum(storage.nbytes() for storage in kept.values()) - policy.spec.num_layers * masks


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("family", "precision"), [("qwen2", "fp32"), ("qwen2", "bf16"), ("qwen3", "fp32"), ("qwen3", "bf16")]
)
def test_activations_are_what_autograd_keeps(tmp_path, family, precision, recompute):
    config, policy = make(tmp_path / "model", family, precision=precision, recompute=recompute)
    spec, layout, e = policy.spec, LayoutSettings.of(config), memory.element_bytes(config)
    per_token = spec.num_layers * cpu_layer(spec, layout, e).kept[recompute] + cpu_ends(spec, layout, e, stage=0)
    assert kept_bytes(policy) == pytest.approx(per_token * sum(LENGTHS), rel=0.05)


@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("qwen3", False), ("llama", False)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_parameters_gradients_and_optimizer_are_what_megatron_allocates(tmp_path, family, tied, precision):
    config, policy = make(tmp_path / "model", family, tied, precision=precision, use_distributed_optimizer=False)
    cluster, layout = Cluster(CHIPS["cpu"], 1, 1), LayoutSettings.of(config)
    parameters = list(policy.chunks[0].parameters())
    assert sum(p.numel() for p in parameters) == dense_params(policy.spec, 1, 1, 0)

    parts = memory.trainer_memory(policy.spec, config, layout, cluster, 1)[0].phases["train"]
    assert parts["weights"] == sum(p.nbytes for p in parameters)
    buffers = [b.grad_data for ddp in policy.wrapped for b in ddp.buffers]
    assert sum(b.nbytes for b in buffers) == pytest.approx(parts["gradients"], rel=0.05)

    assert not policy.train_step([batch()], plain_loss, 100.0).skipped
    state = optimizer_tensors(policy)
    assert sum(t.nbytes for t in state) == pytest.approx(parts["optimizer"], rel=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_average_is_what_plan_counts_and_nothing_without_it(tmp_path, precision):
    config, policy = make(tmp_path / "model", "qwen2", precision=precision)
    cluster, layout = Cluster(CHIPS["cpu"], 1, 1), LayoutSettings.of(config)
    assert policy.average is None
    assert "average weights" not in memory.resident(policy.spec, config, layout, cluster, 0)
    averaged = config.model_copy(update={"algorithm": read_settings({"reference": "ema"})})
    kept = Policy.create(averaged, policy.spec, policy.layout).average
    parts = memory.resident(policy.spec, averaged, layout, cluster, 0)
    assert sum(own.values.nbytes for own in kept.ranges) == parts["average weights"]


def optimizer_tensors(policy: Policy) -> list:
    """Moments and fp32 master weights, each storage once, the model's own parameters left out."""
    own = {p.data_ptr() for p in policy.chunks[0].parameters()}
    found = {}
    for part in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]):
        for parameter, state in part.optimizer.state.items():
            for tensor in (parameter, *state.values()):
                if torch.is_tensor(tensor) and tensor.numel() > 1 and tensor.data_ptr() not in own:
                    found[tensor.data_ptr()] = tensor
    return list(found.values())
