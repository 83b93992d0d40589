"""The transport of the embedded engine: every rank copies every bucket into its own engine's model."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from megatron_nft.weights.buckets import Bucket
from megatron_nft.weights.checksum.nft_checksum import checksum
from megatron_nft.weights.receivers import everyone
from megatron_nft.weights.transport import HFReference, Ledger, Reference, WeightSyncError, compare

if TYPE_CHECKING:
    from megatron_nft.policy.parallel import ParallelLayout


class UpdatableEngine(Protocol):
    """What the transport asks of an engine in this process. EmbeddedEngine says what each call raises."""

    def begin_update(self) -> None: ...

    def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None: ...

    def finish_update(self, version: int) -> None: ...

    def tensors(self) -> dict[str, torch.Tensor]: ...

    def prompt_logprobs(self, token_ids: np.ndarray) -> np.ndarray: ...


class InProcess:
    """See `transport.Transport`. Nothing is ever in flight: the embedded engine answers within a call."""

    name = "in-process"
    dtype: torch.dtype | None = None

    def __init__(self, engine: UpdatableEngine, ledger: Ledger, layout: ParallelLayout) -> None:
        self._engine, self._ledger, self._device = engine, ledger, layout.device
        self.receivers = everyone(layout)
        self.lost: dict[str, str] = {}
        self.must_resend = False

    def pause(self, only: Collection[str] | None = None) -> None:
        pass

    def begin(self, version: int) -> None:
        self._engine.begin_update()

    def reference(self) -> Reference:
        return HFReference()

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def send(self, bucket: Bucket) -> None:
        self._ledger.note(bucket.metas)
        self._engine.update_weights(bucket.tensors)

    def skip(self) -> None:
        pass

    def end_stream(self) -> None:
        pass

    def finish(self, version: int) -> None:
        self._engine.finish_update(version)

    def check(self, reference: dict[str, str]) -> int:
        tensors = self._engine.tensors()
        absent = reference.keys() - tensors.keys()
        if absent:
            raise WeightSyncError(f"the embedded engine has no tensor {', '.join(sorted(absent))}")
        return compare(reference, {name: checksum(tensors[name]) for name in reference}, "the embedded engine")

    def probe(self, token_ids: np.ndarray, logprobs: np.ndarray) -> float:
        return float(np.abs(self._engine.prompt_logprobs(token_ids) - logprobs).max())

    def resume(self, version: int) -> None:
        pass

    def engines(self) -> list[str]:
        return ["embedded"]

    def close(self) -> None:
        pass
