"""What the transports to engine servers share: who controls them, checks, and engines that are lost."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
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
from megatron_nft.weights.receivers import Receivers, nobody
from megatron_nft.weights.routes import Places
from megatron_nft.weights.transport import (
    SPARED,
    EngineLost,
    Ledger,
    Reference,
    Transport,
    WeightSyncError,
    none_left,
    rank_key,
)

T = TypeVar("T")


class Versioned(Protocol):
    """This rank's engine client, which asks for answers of one version."""

    weight_version: int
    syncing: bool  # servers are paused, and their silence means nothing


class ServerTransport(Transport):
    """See `transport.Transport`. Each server is paused, begun, ended, checked and resumed by its caller (`routes.py`).

    Subclasses say how a bucket travels.
    """

    def __init__(
        self,
        servers: Sequence[WeightClient],
        places: Places,
        engine: Versioned,
        config: Config,
        spec: ModelSpec,
        layout: ParallelLayout,
        ledger: Ledger,
    ) -> None:
        """servers: a client for each of `places.servers`, in their order. Collective.

        WeightSyncError where a server does not answer, or their settings differ.
        """
        self._servers, self._engine, self._config, self._spec = list(servers), engine, config, spec
        self._layout, self._ledger = layout, ledger
        of_servers = zip(servers, places.servers, strict=True)
        self._called = [server for server, place in of_servers if places.caller(place) == layout.rank]
        self._leads = layout.is_stage_leader
        self.receivers: Receivers = nobody(layout)
        # two per server: one that hangs in a broadcast can still be told to leave the group
        self._threads = ThreadPoolExecutor(2 * len(servers), thread_name_prefix="weight-sync")
        facts = self._gather_facts()
        self._facts = facts[servers[0].url]
        placed = [
            replace(place, gpus=facts[server.url].gpus, finds_gpu=self._facts.finds_gpu)
            for server, place in zip(servers, places.servers)
        ]
        self._places = replace(places, servers=tuple(placed))
        for server in servers:
            server.configure(self._facts)
        self.lost: dict[str, str] = {}
        self.must_resend = False

    def _gather_facts(self) -> dict[str, ServerFacts]:
        """Return the settings of each server by its URL; they must be alike. Collective."""
        asked: dict[str, ServerFacts] = {}
        problem = ""
        try:
            found = self._threads.map(lambda server: server.facts(), self._called)
            asked = {server.url: facts for server, facts in zip(self._called, found, strict=True)}
        except (EngineLost, WeightSyncError) as error:
            problem = str(error)
        answers = gather_objects((asked, problem), self._layout.world_gloo)
        if problems := [text for _, text in answers if text]:
            raise WeightSyncError("; ".join(problems))
        by_url = {url: facts for of_rank, _ in answers for url, facts in of_rank.items()}
        if len(set(by_url.values())) > 1:
            raise WeightSyncError(f"the servers have different settings: {by_url}")
        return by_url

    def _check_device(self) -> None:
        """WeightSyncError where the servers cannot take tensors from the trainer's device."""
        own, theirs = self._layout.device.type, self._facts.device
        if own != theirs:
            raise WeightSyncError(
                f"sync.transport={self.name}: the trainer's weights are on {own} and the servers run on {theirs}. "
                "Allowed here: disk"
            )

    @property
    def dtype(self) -> torch.dtype | None:
        if self._facts.dtype == "auto":
            return None
        dtype: torch.dtype = getattr(torch, self._facts.dtype)
        return dtype

    def pause(self, only: Collection[str] | None = None) -> None:
        self.lost = {s.url: SPARED for s in self._servers if only is not None and s.url not in only}
        self._engine.syncing = only is None  # else those that have requests go on with them
        in_flight = self._config.sync.in_flight_for(self._config.rollout.mode)
        self._each(lambda server: server.pause(in_flight))

    def begin(self, version: int) -> None:
        self._each(lambda server: server.begin())

    def reference(self) -> Reference:
        return self._servers[0].reference(self._spec)

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._layout.device)

    @abstractmethod
    def send(self, bucket: Bucket) -> None:
        """See `transport.Transport.send`."""

    def skip(self) -> None:
        """Do nothing: no rank waits for another one's bucket."""

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
        self._engine.syncing = False

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
        """Run `call` at once for all servers that this rank calls and that are not lost.

        One that is lost now is noted; WeightSyncError if no rank has one left, as far as is known here, or one refuses.
        """
        servers = [server for server in self._called if server.url not in self.lost]
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
            raise none_left(self.lost)
        return results
