"""What clients of SGLang and vLLM share: an engine that asks one or several servers.

All requests run on one event loop in a thread of the engine's own (asking.py), so that callers stay plain and blocking,
and the connections outlive a single call.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from abc import abstractmethod
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
import numpy as np

from megatron_nft.engines import keys
from megatron_nft.engines.asking import Answers, Asker
from megatron_nft.engines.completions import BadAnswer
from megatron_nft.engines.engine import WAIT_S, Completion, EngineError, OnWait, Request, SamplingParams
from megatron_nft.engines.patience import start_timeout_s
from megatron_nft.engines.reasons import reason
from megatron_nft.engines.routed import RequestRouter
from megatron_nft.engines.streams import HttpStream
from megatron_nft.engines.targets import Targets
from megatron_nft.engines.transports import locate, server_transport
from megatron_nft.engines.watch import Watch
from megatron_nft.processes import allow_open_files

if TYPE_CHECKING:
    from megatron_nft.config import Config, ServerConfig
    from megatron_nft.engines.owners import Owners
    from megatron_nft.engines.server import ServerGroup
    from megatron_nft.engines.sleep import SleepingServers
    from megatron_nft.policy.family import ModelSpec
    from megatron_nft.policy.parallel import ParallelLayout
    from megatron_nft.weights.client import WeightClient
    from megatron_nft.weights.transport import Ledger, Transport

T = TypeVar("T")

PROBE_TIMEOUT_S = 30.0  # for the questions which weights a server has and whether it works; a busy one is slow
KEEP_ALIVE_S = 2.0  # idle connections; servers close them after 5 s, which must not happen to a request on its way
OTHER_FILES = 1024  # that a process has open beside its connections


class HttpEngine(Asker):
    """An engine behind one or several servers that hold the same weights. See `engine.Engine`.

    `all_urls` names the servers of every rank, for the weight sync. This rank asks those of `urls`, and others
    where these are gone.
    """

    def __init__(
        self,
        urls: Sequence[str],
        config: ServerConfig,
        *,
        weight_version: int,
        allow_version_change: bool = False,
        group: ServerGroup | None = None,
        owners: Owners | None = None,
        sleeping: SleepingServers | None = None,
        all_urls: Sequence[str] = (),
        local_urls: Sequence[str] | None = None,
        router: RequestRouter | None = None,
        first: int = 0,
        far: Sequence[str] = (),
        key: str | None = None,
        patience_s: float | None = None,
    ) -> None:
        """allow_version_change: an answer may begin under `weight_version` and end under a newer one.

        group: servers that this process started, ended with the engine. sleeping: the same servers, where they share
        the trainer's GPU (rollout.server.memory_saver). owners: where whoever started the other servers is told of
        them. router: requests go to it. first, far: see `targets.Targets`.
        local_urls: those of `all_urls` on this host, where that is known; else it is found out for the weight sync.
        key: what the servers and the router ask for, see `keys`. patience_s: for a server that is started again.
        """
        if not urls:
            raise ValueError("an engine client needs at least one server URL")
        self.urls, self.all_urls = list(urls), list(all_urls or urls)
        self._local_urls = local_urls
        self.group, self._owners = group, owners
        self._weight_version = weight_version
        self.memory_released = False
        self._sleeping = sleeping
        self._config, self._allow_version_change = config, allow_version_change
        self._patience_s = start_timeout_s(config) if patience_s is None else patience_s
        self._is_helped = False
        self._router, self.key = router, key
        allow_open_files(2 * config.max_in_flight + OTHER_FILES)  # held-out questions may be asked beside a stream
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine-client", daemon=True)
        self._thread.start()
        self._client = httpx.AsyncClient(
            # A proxy of the environment must not see what goes to loopback.
            trust_env=False,
            headers=keys.headers(key),
            timeout=httpx.Timeout(None, connect=10.0),  # watch.py says why there is no other limit
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=config.max_in_flight, keepalive_expiry=KEEP_ALIVE_S
            ),
        )
        self._targets = Targets(urls, router, self._client, self._state, first, far)
        self._watch = Watch(self._targets, self._target_progress, config.stall_timeout_s, self._end_hanging)

    # ---- what an engine kind fills in, beside the methods of `Asker`

    @abstractmethod
    def _prompt_call(self, token_ids: list[int]) -> tuple[str, dict[str, Any]]:
        """Path and JSON body that ask for the log-probs of a prompt."""

    @abstractmethod
    def _prompt_logprobs(self, token_ids: list[int], answer: Any) -> list[float]:
        """Log-probs of all tokens of the prompt but the first."""

    @abstractmethod
    def _weight_client(self, url: str, timeout_s: float) -> WeightClient:
        """The client that brings weights to the server at `url`."""

    # ---- the engine

    @property
    def weight_version(self) -> int:
        """See `engine.Engine.weight_version`."""
        return self._weight_version

    @weight_version.setter
    def weight_version(self, version: int) -> None:
        self._weight_version = version
        self._targets.note_new_weights()

    @property
    def syncing(self) -> bool:
        """Whether a weight sync has paused the servers: they are not taken for hanging meanwhile."""
        return self._watch.syncing

    @syncing.setter
    def syncing(self, syncing: bool) -> None:
        self._watch.syncing = syncing

    def generate(
        self, requests: Sequence[Request], sampling: SamplingParams, on_wait: OnWait | None = None
    ) -> Iterator[tuple[int, int, Completion]]:
        """See `engine.Engine.generate`. Each sample is asked and handed on by itself."""
        self._is_helped = on_wait is not None
        answers: Answers = queue.SimpleQueue()
        asking = self._submit(self._ask_all(requests, sampling, answers))

        def tell_failure(finished: Future[None]) -> None:
            error = None if finished.cancelled() else finished.exception()
            if error is not None:
                answers.put((-1, -1, error))

        asking.add_done_callback(tell_failure)
        try:
            for _ in range(sum(request.num_samples for request in requests)):
                number, sample, completion = self._next(answers, on_wait)
                if isinstance(completion, BaseException):
                    raise completion
                yield number, sample, completion
        finally:
            asking.cancel()  # the servers see the connections close and drop those requests

    is_deterministic = False

    def stream(self, sampling: SamplingParams) -> HttpStream:
        """See `engine.Engine.stream`."""
        self._is_helped = True
        return HttpStream(self, self._submit, sampling, self._config.max_in_flight)

    def _next(self, answers: Answers, on_wait: OnWait | None) -> tuple[int, int, Completion | BaseException]:
        while True:
            try:
                return answers.get(timeout=None if on_wait is None else WAIT_S)
            except queue.Empty:
                assert on_wait is not None
                on_wait(self._watch.take_moved())

    def prompt_logprobs(self, token_ids: np.ndarray, url: str | None = None) -> np.ndarray:
        """int32 [L] -> float32 [L - 1], by the server at `url` or the first. See `engine.Engine.prompt_logprobs`."""
        url = (url or self.urls[0]).rstrip("/")
        tokens = [int(t) for t in token_ids]
        path, body = self._prompt_call(tokens)
        try:
            answer = self._submit(self._ask_once(url, path, body)).result()
            logprobs = np.array(self._prompt_logprobs(tokens, answer), dtype=np.float32)
        except TimeoutError:
            limit = self._config.stall_timeout_s
            raise EngineError(f"{url}: no log-probs within {limit:g} s (rollout.server.stall_timeout_s)") from None
        except (httpx.TransportError, BadAnswer, KeyError, TypeError, ValueError) as e:
            raise EngineError(self._describe([f"{url}: {reason(e)}"])) from None
        if len(logprobs) != len(tokens) - 1:
            raise EngineError(f"{url}: {len(logprobs)} prompt log-probs came for {len(tokens)} tokens")
        return logprobs

    def adopt_version(self) -> None:
        """Take whatever weights the servers have as the wanted ones. EngineError where they differ or one is down."""

        async def version(url: str) -> int:
            try:
                return await self._version(self._client, url)
            except (httpx.HTTPError, KeyError, ValueError) as e:
                raise EngineError(f"the server at {url} does not answer: {reason(e)}") from None

        async def versions() -> list[int]:
            return await asyncio.gather(*(version(url.rstrip("/")) for url in self.urls))

        found = self._submit(versions()).result()
        if len(set(found)) > 1:
            raise EngineError(f"the servers {', '.join(self.urls)} have different weight versions: {found}")
        self.weight_version = found[0]

    def left_behind(self) -> list[str]:
        """See `engine.Engine.left_behind`."""
        return sorted(self._targets.behind)

    def note_good_step(self) -> None:
        """See `engine.Engine.note_good_step`."""
        if self.group is not None:
            self.group.renew()
        if self._router is not None:
            self._router.renew()
        if self._owners is not None:
            with contextlib.suppress(OSError):  # of a shared folder: the next step is told again
                self._owners.tell_good_step()

    def open_transport(self, config: Config, spec: ModelSpec, layout: ParallelLayout, ledger: Ledger) -> Transport:
        """See `engine.Engine.open_transport`. Weights go to the servers of every rank."""
        clients = [self._weight_client(url, config.sync.timeout_s) for url in self.all_urls]
        places = locate(self.all_urls, self._local_urls, layout)
        return server_transport(config.sync.transport, places)(clients, places, self, config, spec, layout, ledger)

    def release_memory(self) -> None:
        """See `engine.Engine.release_memory`. The rank that started the servers tells them; others only note it."""
        if self._config.memory_saver and not self.memory_released:
            if self._sleeping is not None:
                self._sleeping.release()
            self.memory_released = True

    def resume_memory(self) -> None:
        """See `engine.Engine.resume_memory`."""
        if self.memory_released:
            if self._sleeping is not None:
                self._sleeping.resume()
            self.memory_released = False

    def close(self) -> None:
        """Ends the client and the servers that were started with it. May be called twice."""
        if self._loop.is_closed():
            return
        self._submit(self._end_all()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self._router is not None:
            self._router.close()
        if self.group is not None:
            self.group.close()

    # ---- between the threads

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        if self._loop.is_closed():
            coroutine.close()
            raise EngineError("the engine client is closed")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _end_all(self) -> None:
        """End what is under way, and close the connections."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.aclose()

    async def _ask_once(self, url: str, path: str, body: dict[str, Any]) -> Any:
        """See `_post`, for what is answered at once. TimeoutError after rollout.server.stall_timeout_s."""
        async with asyncio.timeout(self._config.stall_timeout_s):
            return await self._post(url, path, body)

    async def _target_progress(self, url: str) -> float:
        """See `watch.ProgressQuery`. A router works if it answers; whether its servers do is asked of each of them."""
        routed = self._targets.routed
        if routed is None or url != routed.target.url:
            return await self._progress(self._client, url)
        await routed.check()
        return self._loop.time()

    def _end_hanging(self, url: str) -> bool:
        """Have a server that hangs ended by whoever started it; it is then started again like one that died."""
        quiet_s = self._config.stall_timeout_s
        if self.group is not None and self.group.end_hanging(url, quiet_s):
            return True
        with contextlib.suppress(OSError):  # it gets no requests in any case
            if (routed := self._targets.routed) is not None and url == routed.target.url:
                routed.end_hanging(quiet_s)
            elif self._owners is not None:
                self._owners.tell_hanging(url, quiet_s)
            else:
                return False
        return True
