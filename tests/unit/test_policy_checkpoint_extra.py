"""Checkpoints of models and optimizers that only a GPU has: Transformer Engine's extra state, classes in groups."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny import make_model

from megatron_nft.config import Config
from megatron_nft.policy import checkpoint, parallel
from megatron_nft.policy.attention import PackedAttention
from megatron_nft.policy.family import read_family
from megatron_nft.policy.fp8_history import fp8_history
from megatron_nft.policy.policy import Policy
from megatron_nft.weights.import_hf import load_hf


@pytest.fixture
def make_policy(tmp_path):
    folder = make_model(tmp_path / "model", "qwen2", hidden=32, layers=2, heads=2, kv_heads=1)
    config = Config.model_validate(
        {
            "run_dir": "unused",
            "model": {"path": str(folder)},
            "data": {"train": ["unused"], "max_prompt_tokens": 32},
            "rollout": {"max_response_tokens": 32},
            "policy": {"precision": "fp32", "micro_batch_tokens": 128},
        }
    )
    layout, spec = parallel.initialize(config.policy, seed=1), read_family(folder)

    def make(weights: bool) -> Policy:
        policy = Policy.create(config, spec, layout)
        if weights:
            load_hf(policy.chunks, folder, spec, layout)
            policy.reload_master_weights()
        return policy

    yield make
    parallel.shutdown()


def test_modules_with_extra_state_and_groups_that_name_classes_can_be_resumed(make_policy, tmp_path, monkeypatch):
    monkeypatch.setattr(PackedAttention, "get_extra_state", lambda self: torch.zeros(1, dtype=torch.uint8))
    monkeypatch.setattr(PackedAttention, "set_extra_state", lambda self, state: pytest.fail("extra state was loaded"))
    saved = make_policy(weights=True)
    assert any(name.endswith("_extra_state") for name in saved.chunks[0].state_dict())  # as Transformer Engine's have
    for group in saved.optimizer.param_groups:
        group["cpu_optimizer_cls"] = torch.optim.AdamW  # as the optimizer on the host has
    checkpoint.save_sharded(saved, tmp_path / "saved")
    loaded = make_policy(weights=False)
    checkpoint.load_sharded(loaded, tmp_path / "saved")
    expected = dict(saved.chunks[0].named_parameters())
    for name, parameter in loaded.chunks[0].named_parameters():
        assert torch.equal(parameter, expected[name]), name


class Linear(torch.nn.Module):
    """Of Transformer Engine's linears what the delayed recipe adds: tensors made by the first call alone."""

    fuse_wgrad_accumulation = True

    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict = {}

    def init_fp8_meta_tensors(self, recipe: str) -> None:
        if "scaling_fwd" not in self.fp8_meta:
            assert recipe == "the delayed recipe"
            for direction, count in (("scaling_fwd", 3), ("scaling_bwd", 2)):
                n = count * self.fp8_meta["num_gemms"]
                self.fp8_meta[direction] = SimpleNamespace(scale=torch.ones(n), amax_history=torch.zeros(4, n))


def with_delayed_recipe(policy: Policy) -> Linear:
    (chunk,) = policy.chunks
    chunk.config.fp8, chunk.config.fp8_recipe = "hybrid", "delayed"
    chunk.decoder.stand_in = Linear()
    return chunk.decoder.stand_in


def test_scales_of_the_delayed_recipe_are_resumed(make_policy, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron.core.fp8_utils.get_fp8_recipe", lambda config: "the delayed recipe")
    before = make_policy(weights=True)
    checkpoint.save_sharded(before, tmp_path / "without")
    linear = with_delayed_recipe(before)
    history = fp8_history(before.chunks)
    assert {tuple(t.shape) for t in history.values()} == {(3,), (4, 3), (2,), (4, 2)}
    for i, tensor in enumerate(history.values()):
        tensor.copy_(torch.arange(tensor.numel()).view_as(tensor) + 10 * i + 2)
    checkpoint.save_sharded(before, tmp_path / "with")
    after = make_policy(weights=False)
    other = with_delayed_recipe(after)
    checkpoint.load_sharded(after, tmp_path / "without")  # of a run in bf16: scales begin anew
    assert other.fp8_meta["scaling_fwd"].scale.tolist() == [1, 1, 1]
    live = other.fp8_meta["scaling_fwd"].scale  # quantizers hold views of it
    checkpoint.load_sharded(after, tmp_path / "with")
    assert live.tolist() == linear.fp8_meta["scaling_fwd"].scale.tolist() == [2, 3, 4]
    for direction in ("scaling_fwd", "scaling_bwd"):
        found, expected = other.fp8_meta[direction], linear.fp8_meta[direction]
        assert torch.equal(found.scale, expected.scale)
        assert torch.equal(found.amax_history, expected.amax_history)


def test_a_state_that_lacks_a_tensor_is_refused(make_policy):
    (chunk,) = make_policy(weights=True).chunks
    state = chunk.state_dict()
    state["more"] = state.pop("decoder.final_layernorm.weight")
    with pytest.raises(ValueError, match=r"lacks \['decoder\.final_layernorm\.weight'\] and has \['more'\] besides"):
        checkpoint._load_model(chunk, state)
