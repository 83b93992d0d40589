"""Which elements of its parameters a rank's distributed optimizers own.

Megatron's distributed optimizer cuts a replica's parameters, laid end to end, into one equal part per data-parallel
rank; the part of a parameter that a rank owns is a range of its flattened elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_nft.policy.optimizer import optimizer_parts


@dataclass(frozen=True, slots=True)
class OwnRange:
    """The elements `start` to `stop` of a flattened parameter, which this rank's optimizer updates."""

    part: DistributedOptimizer
    parameter: torch.nn.Parameter
    start: int
    stop: int

    def states(self) -> dict[str, Tensor]:
        """The optimizer's own flat tensors of the range, by name: fp32 master "param", "exp_avg", "exp_avg_sq"."""
        found = self.part._get_main_param_and_optimizer_states(self.parameter)
        return {name: tensor for name, tensor in found.items() if name != "step"}

    def set_states(self, states: dict[str, Tensor]) -> None:
        """Copy `states` into the optimizer's own."""
        with torch.no_grad():  # in fp32 the master is the weight itself
            self.part._set_main_param_and_optimizer_states(self.parameter, states)

    @property
    def weight(self) -> Tensor:
        """The model's own elements of the range."""
        return self.parameter.detach().view(-1)[self.start : self.stop]


def distributed_parts(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """Optimizers that are divided over data-parallel ranks; empty with policy.use_distributed_optimizer=false."""
    return [part for part in optimizer_parts(optimizer) if isinstance(part, DistributedOptimizer)]


def own_ranges(optimizer: MegatronOptimizer) -> Iterator[OwnRange]:
    """This rank's ranges, in an order that depends on the layout alone."""
    for part in distributed_parts(optimizer):
        for buckets_by_dtype in part.gbuf_ranges:
            for bucket in (bucket for buckets in buckets_by_dtype.values() for bucket in buckets):
                for parameter, ranges in bucket["param_map"].items():
                    yield OwnRange(part, parameter, ranges["param"].start, ranges["param"].end)


def divided_parameters(optimizer: MegatronOptimizer) -> set[torch.nn.Parameter]:
    """Parameters of this rank's model that `own_ranges` of some data-parallel rank cover."""
    return {p for part in distributed_parts(optimizer) for buffer in part.buffers for p in buffer.params}
