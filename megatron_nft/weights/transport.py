"""What a transport is: the last stretch of a weight sync, from a bucket in the trainer to the engines' weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Protocol

import numpy as np
import torch

from megatron_nft.weights.buckets import Bucket, TensorMeta
from megatron_nft.weights.checksum.nft_checksum import checksums
from megatron_nft.weights.hf_folder import name_list
from megatron_nft.weights.receivers import Receivers

SPARED = "has the weights already"
"""Why an engine counts as lost in a sync that leaves it out."""


class WeightSyncError(RuntimeError):
    """A sync that cannot be trusted. The message names the tensors or the engine at fault."""


class EngineLost(Exception):
    """An engine that cannot be reached."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"{url}: {reason}")
        self.url, self.reason = url, reason


def none_left(lost: dict[str, str]) -> WeightSyncError:
    """Return the error of a sync whose engines are all lost. `lost`: engine -> why."""
    return WeightSyncError("no engine is left: " + "; ".join(f"{engine}: {why}" for engine, why in lost.items()))


class Reference(Protocol):
    """Collects the trainer's checksums while buckets stream by, in the form in which the engines have theirs."""

    def add(self, bucket: Bucket) -> None:
        """Hash the tensors of a bucket."""
        ...

    def result(self) -> dict[str, str]:
        """Return the checksums by tensor, under HF names or `rank_key`s of the engine's own names."""
        ...


def rank_key(tensor: str, rank: int, tp_size: int) -> str:
    """Return the key of an engine rank's part of a tensor: `name`, or `name@rank` if the engine has several ranks."""
    return tensor if tp_size == 1 else f"{tensor}@{rank}"


class HFReference:
    """Collects one checksum per HF tensor."""

    def __init__(self) -> None:
        self._found: dict[str, str] = {}

    def add(self, bucket: Bucket) -> None:
        self._found |= checksums(bucket.tensors)

    def result(self) -> dict[str, str]:
        return self._found


class Transport(Protocol):
    """Brings buckets into engines. Every rank has one; `sync.WeightSync` calls the methods in this order.

    A method that fails raises; the sync then goes on with the collectives that other ranks wait in, and ends on every
    rank with the error. An engine that is lost while others are left is no failure: it goes into `lost`.
    """

    name: str
    receivers: Receivers  # ranks whose transport sends every bucket; with nobody, leaders send those of their stage

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype in which the engines want the weights; None for the trainer's own."""
        ...

    lost: dict[str, str]  # engine -> why it does not have the version of this sync
    must_resend: bool  # engines that are left got only part of the stream: it must be sent again

    def pause(self, only: Collection[str] | None = None) -> None:
        """Treat requests under way as `sync.in_flight` says, and let no new ones start.

        only: the engines that take part in this sync; the others count as lost, for the reason `SPARED`.
        """

    def begin(self, version: int) -> None:
        """Get the engines ready for new weights. Collective."""

    def reference(self) -> Reference:
        """Return a new collector of the trainer's checksums, for one sync."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Allocate memory that the export writes buckets into: uint8 [nbytes]."""

    def send(self, bucket: Bucket) -> None:
        """Bring a bucket to the engines; returns when its buffer may be written again."""

    def skip(self) -> None:
        """Take note, in place of `send`, of a bucket that comes after an error; other ranks may wait for this one."""

    def end_stream(self) -> None:
        """Take note that this rank sends no more buckets, perhaps because of an error. Never raises."""

    def finish(self, version: int) -> None:
        """Close the update after the last bucket: the engines answer under `version` once they are resumed."""

    def check(self, reference: dict[str, str]) -> int:
        """Compare the engines' checksums with the trainer's and return the number of tensors that agreed.

        WeightSyncError names the tensors that differ.
        """

    def resume(self, version: int) -> None:
        """Let requests go on; this rank's engine client now asks for `version`."""

    def probe(self, token_ids: np.ndarray, logprobs: np.ndarray) -> float | None:
        """Return the largest |log-prob difference| of this rank's engines from the trainer; None where it asks none."""

    def engines(self) -> list[str]:
        """Return the names of this transport's engines, for the receipt."""

    def close(self) -> None:
        """Close what this transport opened."""


class Ledger:
    """Checks that every tensor is sent exactly once per sync, in its own shape."""

    def __init__(self, expected: dict[str, tuple[int, ...]]):
        """`expected`: HF name -> shape of the whole model."""
        self._expected = expected
        self._sent: set[str] | None = None

    def open(self) -> None:
        """Begin a sync: nothing has been sent."""
        self._sent = set()

    def note(self, metas: Iterable[TensorMeta]) -> None:
        """Note tensors that are sent. WeightSyncError for one that is unknown, misshapen, repeated, or late."""
        for meta in metas:
            if self._sent is None:
                raise WeightSyncError(f"tensor {meta.name}: came after the update was finished")
            if meta.name not in self._expected:
                raise WeightSyncError(f"tensor {meta.name}: the model has none of that name")
            if meta.shape != self._expected[meta.name]:
                raise WeightSyncError(
                    f"tensor {meta.name}: came with shape {list(meta.shape)}, not {list(self._expected[meta.name])}"
                )
            if meta.name in self._sent:
                raise WeightSyncError(f"tensor {meta.name}: came twice in one update")
            self._sent.add(meta.name)

    def close(self) -> set[str]:
        """End a sync and return the names that were sent."""
        sent, self._sent = self._sent or set(), None
        return sent

    def check_complete(self, sent: set[str]) -> None:
        """WeightSyncError, naming them, where tensors are missing from `sent`, the names sent by all ranks."""
        if missing := self._expected.keys() - sent:
            raise WeightSyncError(f"{len(missing)} of {len(self._expected)} tensors did not come: {name_list(missing)}")


def compare(reference: dict[str, str], engine: dict[str, str], who: str) -> int:
    """Return the number of tensors that agree. WeightSyncError names those that differ or that the engine lacks."""
    if wrong := {name for name, value in reference.items() if engine.get(name) != value}:
        raise WeightSyncError(f"{who}: {name_list(wrong)} differ from the trainer's after the sync")
    return len(reference)
