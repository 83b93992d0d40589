"""The policy on two ranks: log-probs over a split vocabulary, optimizer, skipped steps, metrics, wrong input."""

import math
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from launch import Ranks, run_checks
from objectives import Objective
from policies import (
    DENOMINATOR,
    TEMPERATURE,
    UNEVEN,
    VOCAB,
    answer_loss,
    deal,
    loss,
    make_config,
    make_policy,
    make_reference,
    samples,
)

from megatron_nft.data.packing import pack
from megatron_nft.metrics import Max, Mean
from megatron_nft.policy import parallel
from megatron_nft.policy.logprobs import linear_logprobs
from megatron_nft.policy.one_pass import linear_loss
from megatron_nft.policy.policy import Policy
from megatron_nft.weights.import_hf import load_hf

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
VPP = {**PP2, "virtual_pipeline_model_parallel_size": 2}


def make(ranks: Ranks, optimizer: dict | None = None, **policy: object) -> Policy:
    return make_policy(make_reference(ranks, "qwen2", tied=True).model, optimizer=optimizer, **policy)


def state(policy: Policy) -> list[torch.Tensor]:
    """Weights, Adam's moments and steps: all that an update changes."""
    found = [p.detach().clone() for chunk in policy.chunks for p in chunk.parameters()]
    for part in policy.optimizer.chained_optimizers:
        for moments in part.optimizer.state.values():
            found += [value.clone() for value in moments.values()]
    return found


def raises(kind: type[Exception], text: str, call, *args, **kwargs) -> None:
    try:
        call(*args, **kwargs)
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"no {kind.__name__} with {text!r}")


def check_split_vocabulary_is_exact_in_float64(ranks: Ranks) -> None:
    """With and without sequence parallelism; a padded vocabulary, entropy, temperature."""
    tokens, hidden_size, vocab, temperature = 22, 8, 37, 0.7
    group, rows = dist.group.WORLD, 19  # 2 x 19 = 38: the last row of rank 1 is padding
    generator = torch.Generator().manual_seed(0)
    hidden, full = (torch.randn(n, hidden_size, generator=generator, dtype=torch.float64) for n in (tokens, 2 * rows))
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    a, b = torch.randn(2, tokens, generator=generator, dtype=torch.float64)
    x, w = hidden.clone().requires_grad_(), full[:vocab].clone().requires_grad_()
    logp = torch.log_softmax(x @ w.T / temperature, -1)
    expected, entropy = logp.gather(-1, labels[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)
    grad_x, grad_w = torch.autograd.grad((a * expected).sum() + (b * entropy).sum(), (x, w))
    mine, part = slice(ranks.rank * rows, (ranks.rank + 1) * rows), slice(ranks.rank * 11, (ranks.rank + 1) * 11)
    grad_w = torch.cat([grad_w, grad_w.new_zeros(1, hidden_size)])[mine]
    options = {"tp_group": group, "vocab_size": vocab, "temperature": temperature, "with_entropy": True}
    for sequence_parallel in (False, True):
        shard = full[mine].clone().requires_grad_()
        own = (hidden[part] if sequence_parallel else hidden).clone().requires_grad_()
        options_ = options | {"sequence_parallel": sequence_parallel}
        got, got_entropy = linear_logprobs(own, shard, labels, chunk_tokens=5, **options_)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(got_entropy, entropy, rtol=0, atol=1e-12)
        got_x, got_w = torch.autograd.grad((a * got).sum() + (b * got_entropy).sum(), (own, shard))
        torch.testing.assert_close(got_w, grad_w, rtol=0, atol=1e-12)
        torch.testing.assert_close(got_x, grad_x[part] if sequence_parallel else grad_x, rtol=0, atol=1e-12)


def check_one_pass_is_exact_in_float64(ranks: Ranks) -> None:
    """The same for loss and gradients in one pass, straight into a main gradient, whose content stays."""
    tokens, hidden_size, vocab, temperature, scale = 22, 8, 37, 0.7, 1 / 16
    rows = 19
    generator = torch.Generator().manual_seed(0)
    hidden, full = (torch.randn(n, hidden_size, generator=generator, dtype=torch.float64) for n in (tokens, 2 * rows))
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    a = torch.randn(tokens, generator=generator, dtype=torch.float64)
    x, w = hidden.clone().requires_grad_(), full[:vocab].clone().requires_grad_()
    expected = torch.log_softmax(x @ w.T / temperature, -1).gather(-1, labels[:, None]).squeeze(-1)
    losses = a * expected + 0.05 * expected.square()
    grad_x, grad_w = torch.autograd.grad(scale * losses.sum(), (x, w))
    mine, part = slice(ranks.rank * rows, (ranks.rank + 1) * rows), slice(ranks.rank * 11, (ranks.rank + 1) * 11)
    grad_w = torch.cat([grad_w, grad_w.new_zeros(1, hidden_size)])[mine]
    for sequence_parallel in (False, True):
        shard = full[mine].clone().requires_grad_()
        shard.main_grad = torch.full_like(shard, 3.0).detach()
        own = (hidden[part] if sequence_parallel else hidden).clone().requires_grad_()
        got, got_logprobs, got_losses = linear_loss(
            own, shard, labels, lambda logprobs, rows: a[rows] * logprobs + 0.05 * logprobs.square(),
            scale=scale, tp_group=dist.group.WORLD, vocab_size=vocab, temperature=temperature, chunk_tokens=5,
            sequence_parallel=sequence_parallel,
        )  # fmt: skip
        got.backward()
        for found, wanted in (
            (got, scale * losses.sum()),
            (got_logprobs, expected),
            (got_losses, losses),
            (shard.main_grad - 3, grad_w),
            (own.grad, grad_x[part] if sequence_parallel else grad_x),
        ):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def check_updates_are_those_of_torch(ranks: Ranks) -> None:
    """Three steps with clipping, weight decay and warm-up, against torch.optim.AdamW on the transformers model."""
    from transformers import AutoModelForCausalLM

    settings = {"lr": 1e-2, "lr_warmup_steps": 2, "weight_decay": 0.1, "clip_grad": 0.5, "adam_beta2": 0.95}
    reference = make_reference(ranks, "qwen2", tied=True)
    folder = ranks.scratch / "torch-updated"
    if ranks.rank == 0:
        model = AutoModelForCausalLM.from_pretrained(reference.model, dtype=torch.float64, attn_implementation="eager")
        matrices = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        adam = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
        for lr in (0.5e-2, 1e-2, 1e-2):
            for group in adam.param_groups:
                group["lr"] = lr
            adam.zero_grad()
            for sample in samples():
                ids = torch.from_numpy(sample.input_ids).long()
                logits = model(ids[None]).logits[0, :-1] / TEMPERATURE
                row = torch.log_softmax(logits, -1).gather(-1, ids[1:, None]).squeeze(-1)
                answer_loss(row[sample.prompt_length - 1 :], sample).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            adam.step()
        model.float().save_pretrained(folder)
    dist.barrier()
    layouts = ({}, TP2, PP2, {"use_distributed_optimizer": False}, {**TP2, "use_distributed_optimizer": False})
    for layout in layouts:
        policy = make(ranks, settings, **layout)
        start = state(policy)
        lrs = [policy.train_step(deal(policy, UNEVEN), loss, DENOMINATOR, TEMPERATURE).lr for _ in range(3)]
        assert lrs == [0.5e-2, 1e-2, 1e-2]
        updated = state(policy)
        load_hf(policy.chunks, folder, policy.spec, policy.layout)
        names = [name for chunk in policy.chunks for name, _ in chunk.named_parameters()]
        errors = {
            name: float((got - want).norm() / (want - old).norm())
            for name, got, want, old in zip(names, updated, state(policy), start, strict=False)
        }
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] < 1e-3, f"{layout}: the update of {worst} has relative error {errors[worst]:.1e}"


def check_norms_and_biases_are_not_decayed(ranks: Ranks) -> None:
    """With a loss of 0 an update is the decay alone: w (1 - lr x 0.5)."""
    for layout in ({}, {"use_distributed_optimizer": False}, TP2):
        policy = make(ranks, {"lr": 1e-2, "weight_decay": 0.5}, **layout)
        before = [(n, p.detach().clone()) for c in policy.chunks for n, p in c.named_parameters()]
        policy.train_step(deal(policy, UNEVEN), Objective(lambda logprobs, batch: 0 * logprobs), 1.0)
        after = [p for c in policy.chunks for p in c.parameters()]
        kinds = set()
        for (name, old), new in zip(before, after, strict=True):
            decayed = old.dim() > 1
            kinds.add((decayed, name.rsplit(".", 1)[-1]))
            torch.testing.assert_close(new.detach(), old * (1 - 1e-2 * 0.5) if decayed else old, rtol=1e-6, atol=0)
        assert {(False, "bias"), (False, "weight"), (True, "weight")} <= kinds


def check_a_nan_skips_the_step_everywhere(ranks: Ranks) -> None:
    """NaN in one micro-batch of one replica, in loss or gradient, then a good step as if nothing had been."""

    def nan_loss(logprobs, batch):
        bad = 1 in batch.sample_ids  # the second micro-batch of replica 1, or of the only one
        return logprobs * math.nan if bad else -logprobs

    class NanGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * math.inf

    def nan_gradient(logprobs, batch):
        return -(NanGradient.apply(logprobs) if 1 in batch.sample_ids else logprobs)

    splits = [[0, 2], [3, 4], [5, 6], [1, 7]]
    for layout in ({}, TP2, PP2, VPP, {"use_distributed_optimizer": False}):
        policy, untouched = make(ranks, {"lr_warmup_steps": 5}, **layout), make(ranks, {"lr_warmup_steps": 5}, **layout)
        for each in (policy, untouched):
            each.train_step(deal(each, splits), loss, DENOMINATOR)
        before = state(policy)
        for bad, reason in ((nan_loss, "the loss is nan"), (nan_gradient, "the gradient norm is ")):
            report = policy.train_step(deal(policy, splits), Objective(bad), DENOMINATOR)
            assert report.skipped and report.reason.startswith(reason), (layout, report)
            reports = [None] * ranks.world_size
            dist.all_gather_object(reports, (report.skipped, report.reason))
            assert len(set(reports)) == 1
            assert policy.schedule.num_steps == 1
            assert all(torch.equal(a, b) for a, b in zip(before, state(policy), strict=True))
        reports = [each.train_step(deal(each, splits), loss, DENOMINATOR) for each in (policy, untouched)]
        assert reports[0] == reports[1] and not reports[0].skipped
        assert all(torch.equal(a, b) for a, b in zip(state(untouched), state(policy), strict=True))


def check_the_losses_own_tensor_is_not_divided(ranks: Ranks) -> None:
    """Megatron's schedule divides a loss in place by the number of micro-batches; what the loss function kept must not
    change, and the report must not depend on the split."""
    kept = []

    def remembering(logprobs, batch):
        per_token = -logprobs
        kept.append((per_token, per_token.detach().clone()))
        return per_token

    def total(logprobs, loss, batch):
        return {"sum": Mean(loss, batch.loss_mask)}

    reports = []
    for splits in (UNEVEN, [[0, 1, 2, 3], [4, 5, 6, 7]]):
        policy = make(ranks)
        reports.append(policy.train_step(deal(policy, splits), Objective(remembering, total), 10.0))
    assert len(kept) == 3 and all(torch.equal(now, then) for now, then in kept)
    np.testing.assert_allclose(reports[0].loss, reports[1].loss, rtol=1e-6)
    for report in reports:
        np.testing.assert_allclose(report.metrics["sum"].total / 10, report.loss, rtol=1e-6)


def check_values_outside_the_mask_do_not_count(ranks: Ranks) -> None:
    def masked(logprobs, batch):
        return torch.where(batch.loss_mask > 0, -logprobs, math.nan)

    def total(logprobs, loss, batch):
        return {"loss": Mean(loss, 1), "largest": Max(loss)}

    reports = []
    for each in (masked, lambda logprobs, batch: -logprobs):
        policy = make(ranks, **PP2)
        reports.append(policy.train_step(deal(policy, UNEVEN), Objective(each, total), 10.0))
    assert reports[0] == reports[1] and not reports[0].skipped


def check_metrics(ranks: Ranks) -> None:
    def measured(logprobs, loss, batch):
        assert not (torch.is_grad_enabled() or logprobs.requires_grad or loss.requires_grad)
        tokens = batch.tokens[batch.loss_mask > 0].double()
        return {
            "token": Mean(tokens, len(tokens)),
            "batches": Mean(1, 1.0),
            "largest": Max(tokens),
            "least": Max(-tokens),  # below 0 everywhere: fillers must not count as 0
            "constant": Max(3),
            "nothing": Max(tokens[:0]),
        }

    made = samples()
    trained = np.concatenate([s.input_ids[s.prompt_length - 1 : -1] for s in made]).astype(np.float64)
    for layout in ({}, TP2, PP2, VPP):
        policy = make(ranks, **layout)
        batches = deal(policy, UNEVEN)
        report = policy.train_step(batches, Objective(lambda logprobs, batch: -logprobs, measured), 10.0)
        count = len(batches) * policy.layout.dp.size
        assert report.metrics == {
            "token": Mean(trained.sum(), len(trained)),
            "batches": Mean(count, count),
            "largest": Max(trained.max()),
            "least": Max(-trained.min()),
            "constant": Max(3.0),
            "nothing": Max(-math.inf),
        }
        assert report.num_tokens == len(trained)


def check_entropies_of_the_policy(ranks: Ranks) -> None:
    """Against transformers in float64; asking for them leaves the log-probs as they are, bit for bit."""
    from transformers import AutoModelForCausalLM

    folder = make_reference(ranks, "qwen2", tied=True).model
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    expected = []
    with torch.no_grad():
        for sample in samples():
            logp = torch.log_softmax(model(torch.from_numpy(sample.input_ids).long()[None]).logits[0] / TEMPERATURE, -1)
            expected.append(-(logp.exp() * logp).sum(-1).numpy())
    for layout in ({}, TP2, {**TP2, "sequence_parallel": True}, PP2, VPP):
        policy = make(ranks, **layout)
        batches = deal(policy, UNEVEN)
        plain = policy.compute_logprobs(batches, TEMPERATURE)
        logprobs, found = policy.compute_logprobs_and_entropies(batches, TEMPERATURE)
        assert all(np.array_equal(a, b) for a, b in zip(plain, logprobs, strict=True)), layout
        mine = UNEVEN[policy.layout.dp.rank :: policy.layout.dp.size]
        for indices, entropies in zip(mine, found, strict=False):  # fillers have no samples
            rows = np.concatenate([expected[i] for i in indices])
            np.testing.assert_allclose(entropies[: len(rows)], rows, rtol=1e-5, err_msg=str(layout))


def check_every_micro_batch_is_told_once(ranks: Ranks) -> None:
    """With recompute, whose second forward is no progress, and with two chunks per rank."""
    for layout in ({"recompute": "full"}, PP2, VPP):
        policy = make(ranks, **layout)
        batches, told = deal(policy, UNEVEN), []
        policy.on_micro_batch = lambda told=told: told.append(None)
        policy.train_step(batches, Objective(lambda logprobs, batch: -logprobs), 10.0)
        assert len(told) == len(batches)
        policy.compute_logprobs(batches)
        assert len(told) == 2 * len(batches)


def check_changing_metric_names_are_refused(ranks: Ranks) -> None:
    kinds = iter([Mean(1, 1), Max(1)])
    names = iter("abcd")
    policy = make(ranks)
    for metrics in (lambda *_: {next(names): Max(1.0)}, lambda *_: {"same": next(kinds)}):
        changing = Objective(lambda logprobs, batch: -logprobs, metrics)
        raises(ValueError, "the names must not change", policy.train_step, deal(policy, UNEVEN), changing, 1.0)


def check_what_an_objective_returns_is_checked(ranks: Ranks) -> None:
    policy = make(ranks)
    summed = Objective(lambda logprobs, batch: -logprobs.sum())
    raises(ValueError, "the loss has shape ()", policy.train_step, deal(policy, UNEVEN), summed, 1.0)
    bare = Objective(lambda logprobs, batch: -logprobs, lambda *_: {"mine": 1.0})
    raises(TypeError, "metric mine is a float", policy.train_step, deal(policy, UNEVEN), bare, 1.0)


def check_wrong_micro_batches(ranks: Ranks) -> None:
    batch = pack(samples(), [0, 2])  # 12 + 5 tokens
    policy = make(ranks, **VPP)
    raises(ValueError, "no micro-batches", policy.train_step, [], loss, 1.0)
    raises(
        ValueError, "needs a multiple of pipeline_model_parallel_size (2)", policy.train_step, [batch] * 3, loss, 1.0
    )
    raises(ValueError, "denominator is 0.0", policy.train_step, [batch] * 2, loss, 0.0)
    wrong = replace(batch, cu_seqlens=batch.cu_seqlens - 1)
    raises(ValueError, "has 17 tokens but cu_seqlens ends at 16", policy.compute_logprobs, [wrong] * 2)
    policy = make(ranks, sequence_parallel=True, **TP2)
    raises(ValueError, "has 17 tokens", policy.compute_logprobs, [batch])
    assert policy.layout.round_num_micro_batches(0) == 1 and policy.pad_multiple == 2


def check_bf16_is_near_fp32(ranks: Ranks) -> None:
    reference = make_reference(ranks, "qwen2", tied=True)
    for layout in ({}, TP2, PP2):
        policy = make(ranks, precision="bf16", **layout)
        assert {p.dtype for c in policy.chunks for p in c.parameters()} == {torch.bfloat16}
        report = policy.train_step(deal(policy, UNEVEN), loss, DENOMINATOR, TEMPERATURE)
        assert abs(report.loss / reference.loss - 1) < 0.02 and abs(report.grad_norm / reference.grad_norm - 1) < 0.05


def check_bf16_accumulates_in_fp32(ranks: Ranks) -> None:
    """Updates far below a bf16 weight's spacing add up in the fp32 masters: 60 x 1e-4 is 0.006, spacing is 0.004."""
    policy = make(ranks, {"lr": 1e-4, "weight_decay": 0.0}, precision="bf16")
    name, weight = next((n, p) for n, p in policy.chunks[0].named_parameters() if n.endswith("final_layernorm.weight"))
    before = weight.detach().clone()
    for _ in range(60):
        policy.train_step(deal(policy, UNEVEN), loss, DENOMINATOR)
    moved = (weight.detach() - before).float().abs()
    assert (moved > 0).float().mean() > 0.5, (name, moved)


def check_weights_are_nan_until_loaded(ranks: Ranks) -> None:
    policy = make(ranks, load=False)
    assert all(p.isnan().all() for chunk in policy.chunks for p in chunk.parameters())
    report = policy.train_step(deal(policy, UNEVEN), loss, DENOMINATOR)
    assert report.skipped


def check_layouts(ranks: Ranks) -> None:
    reference = make_reference(ranks, "qwen2", tied=True)
    expected = {
        "DP2": ({}, ((0,), (1,))),
        "TP2": (TP2, ((0, 1),)),
        "PP2": (PP2, ((0, 1),)),
        "CP2": ({"context_parallel_size": 2}, ((0, 1),)),
    }
    sizes = {"DP2": (1, 1, 1, 2), "TP2": (2, 1, 1, 1), "PP2": (1, 1, 2, 1), "CP2": (1, 2, 1, 1)}
    for name, (settings, replicas) in expected.items():
        policy = make_policy(reference.model, **settings)
        at = policy.layout
        assert at.replica_ranks == replicas, name
        assert (at.tp.size, at.cp.size, at.pp.size, at.dp.size) == sizes[name]
        assert at.stage_leaders == ((0, 1) if name == "PP2" else (0,))
        assert at.is_stage_leader == (ranks.rank in at.stage_leaders)
        assert at.is_replica_leader == (ranks.rank in [r[0] for r in replicas])
        assert at.is_last_stage == (name != "PP2" or ranks.rank == 1)
        assert at.last_stage_rank == (1 if name == "PP2" else ranks.rank)
        assert dist.get_world_size(at.replica_gloo) == len(replicas[at.dp.rank])
    three = make_config(reference.model, tensor_model_parallel_size=3).policy
    raises(ValueError, "2 processes cannot be divided", parallel.initialize, three, 0)


def check_vocabulary_is_padded(ranks: Ranks) -> None:
    """263 rows over two ranks: 132 each, the last one padding that an update leaves at zero."""
    policy = make(ranks, {"weight_decay": 0.1}, **TP2)
    weight = policy.chunks[0].output_weight
    assert weight.shape[0] == 132 and VOCAB == 263
    policy.train_step(deal(policy, UNEVEN), loss, DENOMINATOR)
    assert (weight[-1] == 0).all() == (ranks.rank == 1)


if __name__ == "__main__":
    run_checks(globals())
