"""Which Adam is in use on a GPU, and the optimizer on the host."""

from __future__ import annotations

import pytest
import torch
from gpu_policies import likelihood_loss, make_policy, make_samples, packed, relative
from objectives import Objective

pytestmark = pytest.mark.needs("engine")

LENGTHS, VOCAB = [200, 33, 150], 512


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tiny import make_model

    return make_model(tmp_path_factory.mktemp("adam") / "model", "qwen2", hidden=256, layers=4, vocab=VOCAB)


def three_steps(policy) -> list:
    batch = packed(policy, make_samples(LENGTHS, VOCAB))
    return [policy.train_step(batch, likelihood_loss, 100.0) for _ in range(3)]


def weights(policy) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for chunk in policy.chunks for name, p in chunk.named_parameters()}


def test_fused_adam_is_used_with_fp32_masters(layout, model):
    policy = make_policy(layout, model)
    assert policy.optimizer_kind.startswith(("Transformer Engine's fused Adam", "apex's fused Adam"))
    assert "sharded over data-parallel ranks" in policy.optimizer_kind
    before = weights(policy)
    reports = three_steps(policy)
    assert not any(r.skipped for r in reports)
    assert all(relative(w, before[name]) > 0 for name, w in weights(policy).items())
    masters = [p for part in policy.optimizer.chained_optimizers for p in part.get_parameters()]
    assert {p.dtype for p in masters} == {torch.float32}


def test_the_optimizer_on_the_host_does_the_same(layout, model):
    here, there = make_policy(layout, model), make_policy(layout, model, optimizer_offload=True)
    assert "on the host, transfers overlapped" in there.optimizer_kind
    a, b = three_steps(here), three_steps(there)
    torch.cuda.synchronize()
    for x, y in zip(a, b, strict=True):
        assert y.loss == pytest.approx(x.loss, rel=1e-3)
        assert y.grad_norm == pytest.approx(x.grad_norm, rel=1e-2)
    ours = weights(here)
    for name, w in weights(there).items():
        assert relative(w, ours[name]) < 2e-3, name


def test_offloading_saves_device_memory(layout, model):
    used = []
    for offload in (False, True):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        policy = make_policy(layout, model, optimizer_offload=offload)
        three_steps(policy)
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated() - before)
        parameters = sum(p.numel() for c in policy.chunks for p in c.parameters())
        del policy
        torch.cuda.empty_cache()
    assert used[0] - used[1] > 0.9 * 12 * parameters


def test_a_skipped_step_leaves_everything_as_it_was(layout, model):
    for offload in (False, True):
        policy = make_policy(layout, model, optimizer_offload=offload)
        three_steps(policy)
        before = weights(policy)
        (batch,) = packed(policy, make_samples(LENGTHS, VOCAB))
        report = policy.train_step([batch], Objective(lambda lp, b: lp * float("nan")), 100.0)
        assert report.skipped
        assert all(torch.equal(w, before[name]) for name, w in weights(policy).items())


@pytest.mark.parametrize(
    "settings",
    [{}, {"optimizer_offload": True}, {"fp8": {"recipe": "delayed"}}, {"fp8": {"recipe": "tensorwise"}}],
    ids=["fused", "host", "delayed", "tensorwise"],
)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(layout, model, settings, tmp_path):
    from megatron_nft.policy.checkpoint import load_sharded, save_sharded

    first = make_policy(layout, model, **settings)
    three_steps(first)
    save_sharded(first, tmp_path / "saved")
    expected = three_steps(first)
    second = make_policy(layout, model, **settings)
    load_sharded(second, tmp_path / "saved")
    for x, y in zip(expected, three_steps(second), strict=True):
        assert y.loss == pytest.approx(x.loss, rel=1e-4)  # attention's gradients are summed in no fixed order
        assert y.lr == x.lr
    ours = weights(first)
    for name, w in weights(second).items():
        assert relative(w, ours[name]) < 1e-3, name


@pytest.mark.parametrize("settings", [{}, {"optimizer_offload": True}], ids=["fused", "host"])
def test_a_snapshot_in_pinned_memory_is_of_its_moment(layout, model, settings, tmp_path):
    """The GPU goes on training before it is written."""
    from megatron_nft.policy.checkpoint import Saver, load_sharded

    first = make_policy(layout, model, **settings)
    three_steps(first)
    expected = weights(first)
    snapshot = Saver(first, copies=True).snapshot()
    assert all(piece.values.is_pinned() for piece in snapshot.pieces)
    three_steps(first)
    (tmp_path / "saved").mkdir()
    snapshot.finish(tmp_path / "saved", [snapshot.write(tmp_path / "saved")])
    second = make_policy(layout, model, **settings)
    load_sharded(second, tmp_path / "saved")
    for name, weight in weights(second).items():
        assert weight.equal(expected[name]), name
