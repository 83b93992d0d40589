"""What the transports to engine servers share: control by rank 0, checks, and engines that are lost."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from megatron_nft.config import Config
from megatron_nft.distributed import gather_objects
from megatron_nft.engines.client import HttpEngine
from megatron_nft.engines.engine import EngineError
from megatron_nft.engines.sglang.shards import engine_key, hf_names_of
from megatron_nft.engines.sglang.weights import SGLangServer
from megatron_nft.engines.vllm.weights import VLLMServer
from megatron_nft.engines.weights import EngineServer, ServerFacts
from megatron_nft.policy.family import ModelSpec
from megatron_nft.policy.parallel import ParallelLayout
from megatron_nft.weights.buckets import Bucket
from megatron_nft.weights.names import hf_shapes
from megatron_nft.weights.transport import EngineLost, Ledger, Reference, WeightSyncError

SERVERS: dict[str, type[EngineServer]] = {"sglang": SGLangServer, "vllm": VLLMServer}


class ServerTransport:
    """See `transport.Transport`. Rank 0 pauses, begins, ends, checks and resumes; stage leaders send.

    Subclasses say how a bucket travels: `_send_to(server, bucket)`.
    """

    name = ""
    everywhere = False

    def __init__(
        self, engine: HttpEngine, config: Config, spec: ModelSpec, layout: ParallelLayout, ledger: Ledger
    ) -> None:
        self._engine, self._config, self._spec, self._layout = engine, config, spec, layout
        self._ledger = ledger
        self._controls = layout.rank == 0
        self._leads = layout.tp_rank == 0 and layout.dp_rank == 0
        kind = SERVERS[config.rollout.engine]
        self._servers: list[EngineServer] = [kind(url, config.sync.timeout_s) for url in engine.all_urls]
        # two per server: one that hangs in a broadcast can still be told to leave the group
        self._threads = ThreadPoolExecutor(2 * len(self._servers), thread_name_prefix="weight-sync")
        self._facts = self._gather_facts()
        for server in self._servers:
            server.known = self._facts
        self.behind: dict[str, str] = {}
        self.torn = False

    def _gather_facts(self) -> ServerFacts:
        """The servers' settings, which must be alike. Collective."""
        found: list[ServerFacts] | str = []
        if self._controls:
            try:
                found = list(self._threads.map(lambda server: server.facts(), self._servers))
            except (EngineLost, WeightSyncError) as error:
                found = str(error)
        found = gather_objects(found, self._layout.world_gloo)[0]
        if isinstance(found, str):
            raise WeightSyncError(found)
        if len(set(found)) > 1:
            raise WeightSyncError(f"the servers have different settings: {dict(zip(self._engine.all_urls, found))}")
        return found[0]

    @property
    def dtype(self) -> torch.dtype | None:
        return None if self._facts.dtype == "auto" else getattr(torch, self._facts.dtype)

    def pause(self) -> None:
        self.behind = {}
        self._each(lambda server: server.pause(self._config.sync.in_flight))

    def begin(self, version: int) -> None:
        self._each(lambda server: server.begin())

    def reference(self) -> Reference:
        return self._servers[0].reference(self._facts, self._spec)

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._layout.device)

    def send(self, bucket: Bucket) -> None:
        self._ledger.note(bucket.metas)
        self._run(lambda server: self._send_to(server, bucket))

    def _send_to(self, server: EngineServer, bucket: Bucket) -> None:
        raise NotImplementedError

    def end_stream(self) -> None:
        pass

    def finish(self, version: int) -> None:
        self._each(lambda server: server.end(version))

    def check(self, reference: dict[str, str]) -> int:
        return sum(self._each(lambda server: self._check(server, reference)))

    def _check(self, server: EngineServer, reference: dict[str, str]) -> int:
        """Tensors that agree; 0 where the server cannot tell, or where its tensors are not what it was sent."""
        found = server.checksums() if self._facts.plain and self._facts.quantization is None else None
        if found is None:
            return 0
        size, expected = self._facts.tp_size, reference
        if not any("@" in key for key in reference):  # every rank has the same
            expected = {engine_key(key, r, size): value for key, value in reference.items() for r in range(size)}
        engine = {engine_key(name, r, size): v for name, by_rank in found.items() for r, v in by_rank.items()}
        wrong = sorted(key for key, value in expected.items() if engine.get(key) != value)
        if wrong:
            names = list(hf_shapes(self._spec))
            text = ", ".join(_described(key, names) for key in wrong[:5])
            text += f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise WeightSyncError(f"{server.url}: differ from the trainer's after the sync: {text}")
        return len(expected)

    def resume(self, version: int) -> None:
        self._each(lambda server: server.resume())
        self._engine.weight_version = version

    def probe(self, token_ids: np.ndarray, logprobs: np.ndarray) -> float | None:
        def difference(server: EngineServer) -> float:
            try:
                found = self._engine.prompt_logprobs(token_ids, url=server.url)
            except EngineError as error:
                raise EngineLost(server.url, str(error)) from None
            return float(np.abs(found - logprobs).max())

        return max(self._each(difference), default=None)

    def engines(self) -> list[str]:
        return [server.url for server in self._servers if server.url not in self.behind]

    def close(self) -> None:
        self._threads.shutdown()
        for server in self._servers:
            server.close()

    def _each(self, call: Callable[[EngineServer], object]) -> list:
        """Run `call(server)` for every server that is not lost, from rank 0 alone."""
        return self._run(call) if self._controls else []

    def _run(self, call: Callable[[EngineServer], object]) -> list:
        """All servers at once. A lost one is noted; WeightSyncError if none is left or one refuses."""
        servers = [server for server in self._servers if server.url not in self.behind]
        results, refusals = [], []
        for server, future in [(s, self._threads.submit(call, s)) for s in servers]:
            try:
                results.append(future.result())
            except EngineLost as lost:
                self.behind[server.url] = lost.reason
            except WeightSyncError as error:
                refusals.append(str(error))
        if refusals:
            raise WeightSyncError("; ".join(refusals))
        if not self.engines():
            raise self._none_left()
        return results

    def _none_left(self) -> WeightSyncError:
        return WeightSyncError("no engine is left: " + "; ".join(f"{u}: {why}" for u, why in self.behind.items()))


def _described(key: str, hf_names: list[str]) -> str:
    """An engine's tensor and, where it is another name, the HF tensors in it."""
    parts = hf_names_of(key, hf_names)
    return key if parts in ([], [key.partition("@")[0]]) else f"{key} ({', '.join(parts)})"
