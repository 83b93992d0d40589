"""The exponential moving average of the trained weights, which a ratio may be taken against.

    average <- decay * average + (1 - decay) * weights        after every optimizer update that was made

A rank keeps the average of the elements that its optimizer updates, in fp32: with the distributed optimizer its own
ranges, without it all parameters of its part of the model. `in_model` brings it into the model for a forward pass and
the weights back afterwards, without room for a second model:

    bf16    the model's elements are overwritten by the average, and afterwards by the optimizer's fp32 masters, which
            round to the very weights that were there
    fp32    the masters are the model's own elements: they change places with the average, range by range
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_nft.policy import cpu
from megatron_nft.policy.own_ranges import distributed_parts, own_ranges


@dataclass(frozen=True, slots=True)
class AveragedRange:
    """Elements of a flattened parameter from `start` on, and their average."""

    parameter: torch.nn.Parameter
    start: int
    weight: Tensor  # [elements], the model's own
    master: Tensor  # [elements], fp32, the optimizer's; in fp32 the same memory as `weight`
    values: Tensor  # [elements], fp32, the average

    @property
    def master_is_weight(self) -> bool:
        """Whether the optimizer updates the model's own elements, as it does in fp32."""
        return self.master.data_ptr() == self.weight.data_ptr()


class WeightAverage:
    """This rank's part of the average. Its values mean nothing until `restart`."""

    def __init__(self, wrapped: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, decay: float) -> None:
        self._wrapped, self._decay = wrapped, decay
        self.divided = bool(distributed_parts(optimizer))  # over data-parallel ranks
        self.ranges = list(_divided(optimizer) if self.divided else _whole(wrapped))

    @torch.no_grad()
    def restart(self) -> None:
        """Make the average that of the present weights alone."""
        for own in self.ranges:
            own.values.copy_(own.master)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an optimizer update."""
        masters = [own.master for own in self.ranges]
        torch._foreach_lerp_([own.values for own in self.ranges], masters, 1.0 - self._decay)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """The model computes with the average inside. Collective over data-parallel ranks.

        After an error inside, a rank has its own part of the weights again, and not that of others: a collective here
        would wait for ranks that do not come.
        """
        self._bring(back=False)
        self._gather()
        try:
            yield
        finally:
            self._bring(back=True)
        self._gather()

    @torch.no_grad()
    def _bring(self, *, back: bool) -> None:
        for own in self.ranges:
            if own.master_is_weight:
                held = own.weight.clone()
                own.weight.copy_(own.values)
                own.values.copy_(held)
            else:
                own.weight.copy_(own.master if back else own.values)

    def _gather(self) -> None:
        """Bring every rank's part of the model to the ranks that hold the same parameters."""
        if self.divided:
            with cpu.on_cpu():
                for ddp in self._wrapped:
                    ddp.start_param_sync(force_sync=True)


def _divided(optimizer: MegatronOptimizer) -> Iterator[AveragedRange]:
    for own in own_ranges(optimizer):
        yield _averaged(own.parameter, own.start, own.weight, own.states()["param"])


def _whole(wrapped: Sequence[DistributedDataParallel]) -> Iterator[AveragedRange]:
    for parameter in (p for ddp in wrapped for p in ddp.module.parameters()):
        master = getattr(parameter, "main_param", parameter)  # Megatron's name for a bf16 parameter's master
        yield _averaged(parameter, 0, parameter.detach().view(-1), master)


def _averaged(parameter: torch.nn.Parameter, start: int, weight: Tensor, master: Tensor) -> AveragedRange:
    flat = master.detach().view(-1)
    return AveragedRange(parameter, start, weight, flat, torch.empty_like(flat))
