"""Weights from the trainer into the engines after every step, and the proof that they arrived.

    pause -> begin -> (gather bucket n+1 | send bucket n) ... -> finish -> check -> resume -> probe -> receipt

A sync either ends on every rank with a receipt, or on every rank with a WeightSyncError that names the tensor or the
engine. An error on one rank does not leave the others in a collective: the export is run to its end first.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_nft.config import Config
from megatron_nft.distributed import any_of, describe_error, gather_objects, raise_any
from megatron_nft.policy.family import ModelSpec
from megatron_nft.policy.parallel import ParallelLayout
from megatron_nft.weights.buckets import Bucket
from megatron_nft.weights.export import Buffers, export_buckets
from megatron_nft.weights.receipt import Receipt
from megatron_nft.weights.transport import SPARED, Ledger, Reference, Transport, WeightSyncError, none_left

Probe = tuple[np.ndarray, np.ndarray]
"""(token ids int32 [L], the trainer's log-probs of token_ids[1:] float32 [L - 1])"""

PROBE_TOLERANCE = {"fp32": 1e-3, "bf16": 0.5, "fp8": 2.0}
"""sync.probe_tolerance by the trainer's precision, or fp8 where the engine quantizes; wrong weights differ by more."""


@dataclass
class _Progress:
    """What one rank knows about the sync under way."""

    seconds: dict[str, float] = field(default_factory=dict)
    reference: Reference | None = None  # of the buckets that were put together here
    nbytes: int = 0  # of those buckets
    error: Exception | None = None
    lost: dict[str, str] = field(default_factory=dict)  # engines that all ranks know to be lost

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time to `name`; keep the first error instead of raising it."""
        start = time.perf_counter()
        try:
            yield
        except Exception as error:
            self.error = self.error or error
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def attempt(self, name: str, work: Callable[[], object]) -> None:
        """Run `work` as a phase, unless there was an error before."""
        if self.error is None:
            with self.phase(name):
                work()


class WeightSync:
    """One rank's end of the weight sync. All ranks make one and call `sync` together."""

    def __init__(
        self, config: Config, spec: ModelSpec, layout: ParallelLayout, transport: Transport, ledger: Ledger
    ) -> None:
        self._config, self._spec, self._layout = config, spec, layout
        self._transport, self._ledger = transport, ledger
        self._sending = ThreadPoolExecutor(1, "weight-send", _use_device, (layout.device,))
        self._hashing = ThreadPoolExecutor(1, "weight-checksums")
        self._in_use: deque[tuple[Future[None], ...]] = deque()  # of each bucket: what still reads it
        self._waited = 0.0  # seconds, for them
        self._aborted = False  # the last sync ended with neither a receipt nor a WeightSyncError
        # Kept over all syncs where they are in host memory: touching fresh pages costs more than the copy.
        self._buffers = Buffers(config.sync.bucket_bytes, layout.device, transport.allocate, self._used)

    @torch.no_grad()
    def sync(
        self,
        chunks: Sequence[torch.nn.Module],
        version: int,
        probe: Probe | None = None,
        only: Collection[str] | None = None,
    ) -> Receipt:
        """Bring the engines to the weights of `chunks`, as `version`. Collective.

        `probe`: a text with the trainer's log-probs under these weights (on every rank), which the engines must agree
        with to within `sync.probe_tolerance`. `only`: engines that missed this version, the others go on with
        their work. WeightSyncError on every rank where anything is not as it should be.
        """
        self._aborted = True
        try:
            receipt = self._sync(chunks, version, probe, only)
        except WeightSyncError:
            self._aborted = False
            raise
        self._aborted = False
        return receipt

    def _sync(
        self, chunks: Sequence[torch.nn.Module], version: int, probe: Probe | None, only: Collection[str] | None
    ) -> Receipt:
        progress, transport = _Progress(), self._transport
        transport.lost, transport.must_resend = {}, False  # of an earlier sync, which may have ended half-way
        self._agree(progress)  # a paused engine would never answer a rank that still waits for it before this sync
        progress.attempt("pause", lambda: transport.pause(only))
        self._agree(progress)
        sent = self._send_all(chunks, version, progress)
        progress.attempt("finish", lambda: self._finish(sent, version))
        self._agree(progress)
        reference = self._whole_reference(progress)
        checked, difference = 0, None
        if progress.reference is not None:
            with progress.phase("check"):
                checked = transport.check(reference)
        self._agree(progress)
        progress.attempt("resume", lambda: transport.resume(version))
        if probe is not None and progress.error is None:
            with progress.phase("probe"):
                difference = self._probe(probe)
        self._agree(progress)
        receipt = self._receipt(progress, version, reference, checked, difference)
        if self._layout.rank == 0:
            receipt.write(self._config.run_dir, again=only is not None)
        return receipt

    def _send_all(self, chunks: Sequence[torch.nn.Module], version: int, progress: _Progress) -> set[str]:
        """Stream to the engines, again without those that were lost in the middle. Returns the names sent here."""
        while True:
            progress.nbytes = 0
            progress.reference = self._transport.reference() if self._config.sync.verify_checksums else None
            self._ledger.open()
            progress.attempt("begin", lambda: self._transport.begin(version))
            self._agree(progress)
            self._stream(chunks, progress)
            sent = self._ledger.close()
            if not self._agree(progress):
                return sent

    @property
    def lost(self) -> dict[str, str]:
        """Engines that could not be reached in the last sync, and why."""
        return {engine: why for engine, why in self._transport.lost.items() if why != SPARED}

    def close(self) -> None:
        """Close the transport. An aborted sync is not waited for: the process is ending."""
        for threads in (self._sending, self._hashing):
            threads.shutdown(wait=not self._aborted, cancel_futures=True)
        if not self._aborted:
            self._transport.close()

    def _stream(self, chunks: Sequence[torch.nn.Module], progress: _Progress) -> None:
        """Export, and send a bucket while the next one is gathered. After an error the export goes on without sending:
        it is a collective."""
        stream = export_buckets(
            chunks,
            self._spec,
            self._layout,
            self._buffers,
            dtype=self._transport.dtype,
            receivers=self._transport.receivers,
        )
        on_gpu = self._layout.device.type == "cuda"
        while True:
            start, self._waited = time.perf_counter(), 0.0
            bucket = next(stream, None)
            spent = time.perf_counter() - start - self._waited
            progress.seconds["gather"] = progress.seconds.get("gather", 0.0) + spent
            progress.seconds["wait"] = progress.seconds.get("wait", 0.0) + self._waited
            if bucket is None:
                break
            if on_gpu:
                torch.cuda.current_stream().synchronize()  # readers do not know of our stream
            progress.nbytes += bucket.nbytes if bucket.own else 0
            hashed = self._hash(bucket, progress)
            sent = [self._sending.submit(self._send, bucket, progress)] if self._sends else []
            self._in_use.append((hashed, *sent))
            del bucket  # one that is larger than a bucket must be gone before the next is made
        if on_gpu:
            self._buffers.release()
        self._transport.end_stream()

    @property
    def _sends(self) -> bool:
        """Whether this rank's transport gets buckets, rather than the export alone passing them on to receivers."""
        receivers = self._transport.receivers.ranks
        return not receivers or self._layout.rank in receivers

    @torch.no_grad()  # which holds for a thread, not for those it starts
    def _send(self, bucket: Bucket, progress: _Progress) -> None:
        with progress.phase("send"):
            if progress.error is None:
                self._transport.send(bucket)
            else:
                self._transport.skip()

    def _used(self) -> None:
        """Wait until nothing reads the oldest bucket any more."""
        start = time.perf_counter()
        for future in self._in_use.popleft():
            future.result()
        self._waited += time.perf_counter() - start

    def _hash(self, bucket: Bucket, progress: _Progress) -> Future[None]:
        """Hash a bucket while it is sent: SHA-256 releases Python's lock. On a GPU the hash is only queued here."""

        def work() -> None:
            if bucket.own and progress.reference is not None:
                with progress.phase("checksum"):
                    progress.reference.add(bucket)

        if not bucket.flat.is_cuda:
            return self._hashing.submit(work)
        work()
        finished: Future[None] = Future()
        finished.set_result(None)
        return finished

    def _finish(self, sent: set[str], version: int) -> None:
        if not self._transport.receivers.ranks:  # each leader has sent a part
            sent = set().union(*gather_objects(sent, self._layout.world_gloo))
        if self._sends:
            self._ledger.check_complete(sent)
        self._transport.finish(version)

    def _whole_reference(self, progress: _Progress) -> dict[str, str]:
        """Return the checksums of all stages, on every rank: one short string per tensor."""
        leads = self._layout.is_stage_leader
        own = progress.reference.result() if leads and progress.reference is not None else {}
        parts = gather_objects(own, self._layout.world_gloo)
        return {name: value for part in parts for name, value in part.items()}

    def _probe(self, probe: Probe) -> float | None:
        precision: str = self._config.policy.precision
        rollout = self._config.rollout
        if rollout.uses_servers and (rollout.server.quantization == "fp8" or rollout.server.kv_cache_dtype != "auto"):
            precision = "fp8"
        tolerance = self._config.sync.probe_tolerance or PROBE_TOLERANCE[precision]
        difference = self._transport.probe(*probe)
        if difference is not None and not difference <= tolerance:
            raise WeightSyncError(
                f"the engine's log-probs of the probe differ from the trainer's by {difference:.3g}, more than "
                f"sync.probe_tolerance ({tolerance:g})"
            )
        return difference

    def _agree(self, progress: _Progress) -> bool:
        """Tell all ranks of errors and of lost engines. Return whether the stream must be sent again."""
        transport = self._transport
        has_news = progress.error is not None or transport.lost != progress.lost or transport.must_resend
        if not any_of(has_news, self._layout.world_gloo):
            return False
        known = (describe_error(progress.error, WeightSyncError), transport.lost, transport.must_resend)
        ranks = gather_objects(known, self._layout.world_gloo)
        for _, lost, _ in ranks:
            transport.lost |= lost
        progress.lost = dict(transport.lost)
        raise_any([message for message, _, _ in ranks], WeightSyncError, progress.error)
        if not transport.engines():  # those of each host are known to its own ranks first
            raise none_left(transport.lost)
        return any(must_resend for _, _, must_resend in ranks)

    def _receipt(
        self, progress: _Progress, version: int, reference: dict[str, str], checked: int, difference: float | None
    ) -> Receipt:
        facts = (progress.seconds, progress.nbytes, checked, difference, self._transport.engines())
        leads = self._layout.is_stage_leader
        ranks = gather_objects((*facts, leads), self._layout.world_gloo)
        phases = {name for seconds, *_ in ranks for name in seconds}
        differences = [d for _, _, _, d, *_ in ranks if d is not None]
        receipt = Receipt(
            version=version,
            transport=self._transport.name,
            engines=sorted({engine for *_, engines, _ in ranks for engine in engines}),
            behind={engine: why for engine, why in self._transport.lost.items() if why != SPARED},
            nbytes=sum(nbytes for _, nbytes, *_, is_leader in ranks if is_leader),
            seconds={p: max(seconds.get(p, 0.0) for seconds, *_ in ranks) for p in sorted(phases)},
            checksums=reference,
            engine_checked=sum(count for _, _, count, *_ in ranks),
            probe_difference=max(differences, default=None),
        )
        if self._config.sync.verify_checksums and not checked_or_probed(receipt):
            raise WeightSyncError(
                f"nobody can say whether the engines {', '.join(receipt.engines)} have the new weights: they give no "
                "checksums, and no probe was made"
            )
        return receipt


def _use_device(device: torch.device) -> None:
    """Set the GPU of a new thread: torch keeps the current one per thread, not per process."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def checked_or_probed(receipt: Receipt) -> bool:
    """Return whether an engine's own checksums or the probe of `receipt` showed that the weights arrived."""
    return receipt.engine_checked > 0 or receipt.probe_difference is not None
