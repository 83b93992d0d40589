"""An algorithm outside of the package, as a user writes one: settings, samples, loss and a metric of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_nft.algorithms import Algorithm, AlgorithmSettings, counted, training_sample
from megatron_nft.metrics import Mean
from megatron_nft.section import PositiveFloat

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_nft.metrics import Max
    from megatron_nft.types import PackedBatch, RolloutGroup, TrainingSample


class Settings(AlgorithmSettings):
    """Likelihood of right answers up, of wrong answers down."""

    strength: PositiveFloat = 1.0
    """Factor of the loss."""


class OwnLikelihood(Algorithm):
    Settings = Settings
    settings: Settings

    def samples(self, group: RolloutGroup) -> list[TrainingSample]:
        return [training_sample(group, r, advantage=1.0 if r.correct else -0.5) for r in counted(group)]

    def loss(self, logprobs: Tensor, batch: PackedBatch) -> Tensor:
        return -self.settings.strength * batch.advantage * (logprobs - batch.behaviour_logprobs).exp()

    def metrics(self, logprobs: Tensor, loss: Tensor, batch: PackedBatch) -> dict[str, Mean | Max]:
        own = Mean((batch.advantage * batch.loss_mask).sum(), batch.loss_mask.sum())
        return super().metrics(logprobs, loss, batch) | {"own/advantage": own}
