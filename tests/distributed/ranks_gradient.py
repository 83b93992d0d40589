"""One gradient: for one fixed batch it is the same in every layout, packing and split, and equals transformers'.

Every check runs the whole train step with the non-distributed optimizer (whose gradients stay whole on every replica)
and compares log-probs, loss, gradient norm and every gradient with the float64 reference.
"""

from dataclasses import replace
from functools import partial
from unittest import mock

import numpy as np
import torch
from launch import Ranks, run_checks
from megatron.core.distributed import DistributedDataParallelConfig
from policies import (
    DENOMINATOR,
    ONE_BY_ONE,
    PACKED,
    TEMPERATURE,
    UNEVEN,
    deal,
    gradient_errors,
    loss,
    make_policy,
    make_reference,
    samples,
    step,
)

from megatron_nft.policy import policy as policy_module
from megatron_nft.policy.policy import Policy

FAMILIES = (("qwen2", True), ("qwen3", False), ("llama", False))
TOLERANCE = 1e-5
SMALL_BUCKETS = partial(DistributedDataParallelConfig, bucket_size=3000)  # else a tiny model has one
ROPE = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,  # so that the samples' positions meet all three cases
    }
}


def compare(ranks: Ranks, splits_of: dict[str, list[list[int]]], families=FAMILIES, **layout: object) -> None:
    for family, tied in families:
        reference = make_reference(ranks, family, tied=tied, **(ROPE if family == "llama" else {}))
        one_pass = layout.get("context_parallel_size", 1) == 1
        head = "one_pass" if one_pass else "auto"
        options = {"use_distributed_optimizer": False, "lm_head": head, "optimizer": {"clip_grad": 0.0}}
        policy = make_policy(reference.model, **options, **layout)
        weights = [p.detach().clone() for chunk in policy.chunks for p in chunk.parameters()]
        for name, splits in splits_of.items():
            load_weights(policy, weights)
            batches = deal(policy, splits)
            compare_logprobs(policy, batches, splits, reference, f"{family}, {name}, {layout}")
            two_passes = replace(loss, per_token=False)  # over the logits
            for how in (two_passes, loss) if one_pass else (two_passes,):
                where = f"{family}, {name}, {layout}, per token {how.per_token}"
                load_weights(policy, weights)
                report = policy.train_step(batches, how, DENOMINATOR, TEMPERATURE)
                assert not report.skipped
                np.testing.assert_allclose(report.loss, reference.loss, rtol=TOLERANCE, err_msg=where)
                np.testing.assert_allclose(report.grad_norm, reference.grad_norm, rtol=TOLERANCE, err_msg=where)
                errors = gradient_errors(policy, reference)
                worst = max(errors, key=errors.__getitem__)
                assert errors[worst] <= TOLERANCE, f"{where}: {worst} has relative error {errors[worst]:.2e}"
                compare_report(report, reference, where)


def load_weights(policy: Policy, weights: list[torch.Tensor]) -> None:
    """Take the last update back."""
    with torch.no_grad():
        for p, w in zip((p for c in policy.chunks for p in c.parameters()), weights, strict=True):
            p.copy_(w)
    policy.reload_master_weights()


def compare_logprobs(policy, batches, splits, reference, where) -> None:
    found = policy.compute_logprobs(batches, TEMPERATURE)
    mine = splits[policy.layout.dp.rank :: policy.layout.dp.size]
    for batch, indices, row in zip(batches, mine, found, strict=False):  # fillers have no samples
        for start, i in zip(batch.cu_seqlens.tolist(), indices, strict=False):
            expected = reference.logprobs[i][:-1]  # the last token predicts nothing
            np.testing.assert_allclose(row[start : start + len(expected)], expected, atol=2e-5, err_msg=where)


def compare_report(report, reference, where) -> None:
    made = samples()
    trained = sum(s.response_length for s in made)
    rows = [reference.logprobs[i][s.prompt_length - 1 : -1] for i, s in enumerate(made)]
    assert report.num_tokens == trained, where
    logprob = report.metrics["logprob"]
    np.testing.assert_allclose(logprob.total, np.concatenate(rows).sum(), rtol=TOLERANCE, err_msg=where)
    assert logprob.count == trained, where
    # fillers have advantage 0 only outside the mask: the maximum is that of the real samples
    expected = max(np.float32(s.advantage) for s in made)
    np.testing.assert_allclose(report.metrics["max_advantage"].value, expected, rtol=1e-6, err_msg=where)


ALL_SPLITS = {"packed": PACKED, "one by one": ONE_BY_ONE, "uneven": UNEVEN}


def check_data_parallel_4(ranks: Ranks) -> None:
    compare(ranks, ALL_SPLITS)


def check_tensor_parallel_2(ranks: Ranks) -> None:
    compare(ranks, ALL_SPLITS, tensor_model_parallel_size=2)


def check_sequence_parallel(ranks: Ranks) -> None:
    compare(ranks, ALL_SPLITS, tensor_model_parallel_size=2, sequence_parallel=True)


def check_pipeline_parallel_2(ranks: Ranks) -> None:
    compare(ranks, ALL_SPLITS, pipeline_model_parallel_size=2)


def check_pipeline_parallel_4(ranks: Ranks) -> None:
    compare(ranks, {"uneven": UNEVEN}, pipeline_model_parallel_size=4)


def check_virtual_pipeline(ranks: Ranks) -> None:
    compare(ranks, ALL_SPLITS, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)


def check_tensor_and_pipeline(ranks: Ranks) -> None:
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
    compare(ranks, {"uneven": UNEVEN}, **layout)
    compare(ranks, {"uneven": UNEVEN}, virtual_pipeline_model_parallel_size=2, **layout)


def check_full_recompute(ranks: Ranks) -> None:
    compare(ranks, {"uneven": UNEVEN}, recompute="full", tensor_model_parallel_size=2)


def check_selective_recompute(ranks: Ranks) -> None:
    compare(ranks, {"uneven": UNEVEN}, recompute="selective", pipeline_model_parallel_size=2)


def check_overlapped_reduction(ranks: Ranks) -> None:
    compare(ranks, {"one by one": ONE_BY_ONE}, overlap_grad_reduce=True, pipeline_model_parallel_size=2)


def check_overlapped_gather(ranks: Ranks) -> None:
    """Three updates with the weights gathered during the next forward pass end where those of plain updates do."""
    for family, tied, layout in (
        ("qwen2", True, {}),
        ("qwen3", False, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        ("qwen2", True, {"pipeline_model_parallel_size": 2}),
        ("qwen3", False, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    ):
        reference = make_reference(ranks, family, tied=tied)
        ends = []
        for overlap in (False, True):
            options = {"overlap_grad_reduce": overlap, "overlap_param_gather": overlap}
            with mock.patch.object(policy_module, "DistributedDataParallelConfig", SMALL_BUCKETS):
                policy = make_policy(reference.model, **options, **layout)
            if overlap and policy.layout.pp.rank == 0:  # Megatron makes one bucket on later stages
                assert len(policy.wrapped[0].bucket_groups) > 2
            norms = [step(policy) for _ in range(3)]
            policy.finish_updates()
            ends.append((norms, [p.detach().clone() for c in policy.chunks for p in c.parameters()]))
        np.testing.assert_allclose(ends[1][0], ends[0][0], rtol=TOLERANCE, err_msg=f"{family} {layout}")
        for plain, overlapped in zip(ends[0][1], ends[1][1], strict=True):
            torch.testing.assert_close(overlapped, plain, rtol=0, atol=2e-5)


def check_mixture_of_experts(ranks: Ranks) -> None:
    moe = (("qwen3_moe", False),)
    compare(ranks, ALL_SPLITS, moe)
    compare(ranks, {"uneven": UNEVEN}, moe, tensor_model_parallel_size=2, sequence_parallel=True)
    compare(ranks, {"uneven": UNEVEN}, moe, pipeline_model_parallel_size=2)
    compare(ranks, {"uneven": UNEVEN}, moe, expert_model_parallel_size=2)


if __name__ == "__main__":
    run_checks(globals())
