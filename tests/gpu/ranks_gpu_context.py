"""One of two ranks, a GPU each: log-probs and gradients under CP 2 are those of a replica of one rank. Argument: a
model folder. Started by test_gpu_context.py; a difference ends the rank with an error.

Tensor parallelism would leave nothing for CP on two GPUs; what the two do together is compared on a CPU alone
(tests/distributed/ranks_context.py).
"""

from __future__ import annotations

import sys

import numpy as np
import torch
import torch.distributed as dist
from gpu_policies import gradients, make_config, make_policy, make_samples, packed, relative
from objectives import Objective

from megatron_nft.data.packing import filler, unpack
from megatron_nft.policy import parallel
from megatron_nft.policy.policy import Policy

LENGTHS = [37, 5, 120, 64, 2, 19, 513]
VOCAB, DENOMINATOR = 300, 37.0

quadratic = Objective(lambda logprobs, batch: -batch.advantage * logprobs + 0.05 * logprobs.square())


def one_step(policy: Policy) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """(log-probs of all answers' tokens, gradients); with two replicas the second one has a filler."""
    samples = make_samples(LENGTHS, VOCAB)
    mine = policy.layout.dp.rank == 0
    (batch,) = packed(policy, samples) if mine else [filler(policy.pad_multiple, policy.layout.device)]
    (found,) = policy.compute_logprobs([batch])
    policy.train_step([batch], quadratic, DENOMINATOR)
    told = [np.concatenate(unpack(found, batch)) if mine else None]
    dist.broadcast_object_list(told, 0, group=policy.layout.world_gloo)
    return told[0], gradients(policy)


def main(model: str) -> None:
    found = []
    for size in (1, 2):
        settings = {"context_parallel_size": size, "use_distributed_optimizer": False}
        layout = parallel.initialize(make_config(model, **settings).policy, seed=1)
        assert (layout.cp.size, layout.dp.size) == (size, 2 // size)
        found.append(one_step(make_policy(layout, model, optimizer={"clip_grad": 0}, **settings)))
    (logprobs, expected), (split_logprobs, split_gradients) = found
    errors = np.abs(split_logprobs - logprobs)
    assert errors.mean() < 0.01 and errors.max() < 0.2, (errors.mean(), errors.max())  # bf16, two ways to add
    wrong = {name: e for name, g in split_gradients.items() if not (e := relative(g, expected[name])) < 0.05}
    assert not wrong, wrong
    print("as on one rank", flush=True)
    parallel.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
