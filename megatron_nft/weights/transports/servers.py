"""What the transports to engine servers share: control by rank 0, checks, and engines that are lost."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import numpy as np
import torch

from megatron_nft.config import Config
from megatron_nft.distributed import gather_objects
from megatron_nft.policy.family import ModelSpec
from megatron_nft.policy.parallel import ParallelLayout
from megatron_nft.weights.buckets import Bucket
from megatron_nft.weights.client import ServerFacts, WeightClient
from megatron_nft.weights.names import hf_shapes
from megatron_nft.weights.transport import SPARED, EngineLost, Ledger, Reference, Transport, WeightSyncError, rank_key

T = TypeVar("T")


class Versioned(Protocol):
    """This rank's engine client, which asks for answers of one version."""

    weight_version: int


class ServerTransport(Transport):
    """See `transport.Transport`. Rank 0 pauses, begins, ends, checks and resumes; stage leaders send.

    Subclasses say how a bucket travels.
    """

    everywhere = False

    def __init__(
        self,
        servers: Sequence[WeightClient],
        engine: Versioned,
        config: Config,
        spec: ModelSpec,
        layout: ParallelLayout,
        ledger: Ledger,
    ) -> None:
        """servers: the same ones in the same order on every rank. Collective. WeightSyncError where they differ."""
        self._servers, self._engine = servers, engine
        self._config, self._spec, self._layout, self._ledger = config, spec, layout, ledger
        self._controls = layout.rank == 0
        self._leads = layout.tp.rank == 0 and layout.dp.rank == 0
        # two per server: one that hangs in a broadcast can still be told to leave the group
        self._threads = ThreadPoolExecutor(2 * len(servers), thread_name_prefix="weight-sync")
        self._facts = self._gather_facts()
        for server in servers:
            server.configure(self._facts)
        self.lost: dict[str, str] = {}
        self.must_resend = False

    def _gather_facts(self) -> ServerFacts:
        """Return the servers' settings, which must be alike. Collective."""
        asked: list[ServerFacts] | str = []
        if self._controls:
            try:
                asked = list(self._threads.map(lambda server: server.facts(), self._servers))
            except (EngineLost, WeightSyncError) as error:
                asked = str(error)
        found = gather_objects(asked, self._layout.world_gloo)[0]
        if isinstance(found, str):
            raise WeightSyncError(found)
        if len(set(found)) > 1:
            by_url = {server.url: facts for server, facts in zip(self._servers, found, strict=True)}
            raise WeightSyncError(f"the servers have different settings: {by_url}")
        return found[0]

    @property
    def dtype(self) -> torch.dtype | None:
        if self._facts.dtype == "auto":
            return None
        dtype: torch.dtype = getattr(torch, self._facts.dtype)
        return dtype

    def pause(self, only: Collection[str] | None = None) -> None:
        self.lost = {s.url: SPARED for s in self._servers if only is not None and s.url not in only}
        self._each(lambda server: server.pause(self._config.sync.in_flight))

    def begin(self, version: int) -> None:
        self._each(lambda server: server.begin())

    def reference(self) -> Reference:
        return self._servers[0].reference(self._spec)

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._layout.device)

    @abstractmethod
    def send(self, bucket: Bucket) -> None:
        """See `transport.Transport.send`."""

    def end_stream(self) -> None:
        """Do nothing: the servers have answered for every bucket."""

    def finish(self, version: int) -> None:
        self._each(lambda server: server.end(version))

    def check(self, reference: dict[str, str]) -> int:
        return sum(self._each(lambda server: self._check(server, reference)))

    def _check(self, server: WeightClient, reference: dict[str, str]) -> int:
        """Return the number of tensors that agree; 0 where the server cannot tell or does not keep what it was sent."""
        found = server.checksums() if self._facts.plain and self._facts.quantization is None else None
        if found is None:
            return 0
        size, expected = self._facts.tp_size, reference
        if not any("@" in key for key in reference):  # every rank has the same
            expected = {rank_key(key, r, size): value for key, value in reference.items() for r in range(size)}
        engine = {rank_key(name, r, size): v for name, by_rank in found.items() for r, v in by_rank.items()}
        wrong = sorted(key for key, value in expected.items() if engine.get(key) != value)
        if wrong:
            text = ", ".join(self._describe(server, key) for key in wrong[:5])
            text += f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise WeightSyncError(f"{server.url}: differ from the trainer's after the sync: {text}")
        return len(expected)

    def _describe(self, server: WeightClient, key: str) -> str:
        """Name an engine's tensor and, where it has another name, the HF tensors in it."""
        name = key.partition("@")[0]
        parts = server.hf_names_of(name, list(hf_shapes(self._spec)))
        return key if parts in ([], [name]) else f"{key} ({', '.join(parts)})"

    def resume(self, version: int) -> None:
        self._each(lambda server: server.resume())
        self._engine.weight_version = version

    def probe(self, token_ids: np.ndarray, logprobs: np.ndarray) -> float | None:
        def difference(server: WeightClient) -> float:
            return float(np.abs(server.prompt_logprobs(token_ids) - logprobs).max())

        return max(self._each(difference), default=None)

    def engines(self) -> list[str]:
        return [server.url for server in self._servers if server.url not in self.lost]

    def close(self) -> None:
        self._threads.shutdown()
        for server in self._servers:
            server.close()

    def _each(self, call: Callable[[WeightClient], T]) -> list[T]:
        """Run `call(server)` for every server that is not lost, from rank 0 alone."""
        return self._run(call) if self._controls else []

    def _run(self, call: Callable[[WeightClient], T]) -> list[T]:
        """Run `call` for all servers at once. A lost one is noted; WeightSyncError if none is left or one refuses."""
        servers = [server for server in self._servers if server.url not in self.lost]
        results, refusals = [], []
        for server, future in [(s, self._threads.submit(call, s)) for s in servers]:
            try:
                results.append(future.result())
            except EngineLost as lost:
                self.lost[server.url] = lost.reason
            except WeightSyncError as error:
                refusals.append(str(error))
        if refusals:
            raise WeightSyncError("; ".join(refusals))
        if not self.engines():
            raise self._none_left()
        return results

    def _none_left(self) -> WeightSyncError:
        return WeightSyncError("no engine is left: " + "; ".join(f"{u}: {why}" for u, why in self.lost.items()))
