"""One gradient under context parallelism: that of one rank, with every other kind of parallelism, packing and split."""

import itertools

import numpy as np
import torch
from launch import Ranks, run_checks
from policies import ONE_BY_ONE, PACKED, TEMPERATURE, UNEVEN, make_policy, make_reference, samples
from ranks_gradient import ALL_SPLITS, compare
from torch.testing import assert_close

from megatron_nft.data.packing import pack
from megatron_nft.policy.context_parallel import TokenSplit, split_tokens

CP2 = {"context_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
TIED, NORMED = (("qwen2", True),), (("qwen3", False),)


def check_two_ranks(ranks: Ranks) -> None:
    compare(ranks, ALL_SPLITS, **CP2)


def check_four_ranks(ranks: Ranks) -> None:
    compare(ranks, {"packed": PACKED, "uneven": UNEVEN}, NORMED, context_parallel_size=4)


def check_tensor_and_sequence_parallel(ranks: Ranks) -> None:
    compare(ranks, {"uneven": UNEVEN}, NORMED, **TP2, **CP2)
    compare(ranks, ALL_SPLITS, TIED, sequence_parallel=True, **TP2, **CP2)


def check_pipeline_parallel(ranks: Ranks) -> None:
    compare(ranks, ALL_SPLITS, TIED, **PP2, **CP2)
    compare(ranks, {"uneven": UNEVEN}, NORMED, virtual_pipeline_model_parallel_size=2, **PP2, **CP2)


def check_recompute(ranks: Ranks) -> None:
    compare(ranks, {"uneven": UNEVEN}, TIED, recompute="full", **CP2)
    compare(ranks, {"uneven": UNEVEN}, TIED, recompute="selective", **CP2)


def check_overlapped_reduction(ranks: Ranks) -> None:
    compare(ranks, {"one by one": ONE_BY_ONE}, TIED, overlap_grad_reduce=True, **CP2)


def check_mixture_of_experts(ranks: Ranks) -> None:
    moe = (("qwen3_moe", False),)
    compare(ranks, {"uneven": UNEVEN}, moe, **CP2)
    compare(ranks, {"uneven": UNEVEN}, moe, sequence_parallel=True, expert_model_parallel_size=2, **TP2, **CP2)


def check_collectives_and_their_gradients(ranks: Ranks) -> None:
    """`whole` gives a rank the gradient of its own tokens, `gather` the sum of what all ranks made of them."""
    policy = make_policy(make_reference(ranks, "qwen2", tied=True).model, context_parallel_size=4)
    bounds = torch.tensor([0, 8, 24], dtype=torch.int32)
    split = TokenSplit.of(bounds, policy.layout.cp)
    assert split.rank == ranks.rank and torch.equal(split.by_rank, split_tokens(bounds, 4))
    everything = torch.arange(24.0) ** 2
    own = split.own(everything).requires_grad_()
    whole = split.whole(own)
    assert_close(whole, everything)
    (whole * torch.arange(24.0)).sum().backward()
    assert_close(own.grad, split.own(torch.arange(24.0)))
    own = split.own(torch.stack([everything, -everything], 1)).requires_grad_()
    gathered = split.gather(own)
    assert_close(gathered[split.places], torch.stack([everything, -everything], 1))
    (gathered * (1.0 + ranks.rank)).sum().backward()
    assert_close(own.grad, torch.full((6, 2), 1.0 + 2.0 + 3.0 + 4.0))


def check_entropies(ranks: Ranks) -> None:
    """Those of one rank, in the micro-batch's order."""
    model = make_reference(ranks, "qwen2", tied=True).model
    batch = pack(samples(), list(itertools.chain(*UNEVEN)), multiple_of=8, segment_multiple=8)  # for both layouts
    found = []
    for layout in ({"context_parallel_size": 4}, {}):
        found.append(np.stack(make_policy(model, **layout).compute_logprobs_and_entropies([batch], TEMPERATURE)))
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    assert found[0][1].min() > 1.0


if __name__ == "__main__":
    run_checks(globals())
