"""What clients of SGLang and vLLM share: many requests in flight, spread over servers, retried within a bound.

All requests run on one event loop in a thread of the engine's own, so that callers stay plain and blocking, and the
connections outlive a single call.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
import numpy as np

from megatron_nft.engines import keys
from megatron_nft.engines.completions import Aborted, BadAnswer, check_completions, check_versions
from megatron_nft.engines.engine import Completion, EngineError, Request, SamplingParams, WeightVersionError
from megatron_nft.engines.reasons import reason
from megatron_nft.engines.targets import RequestRouter, Target, Targets
from megatron_nft.engines.transports import server_transport

if TYPE_CHECKING:
    from megatron_nft.config import Config, ServerConfig
    from megatron_nft.engines.server import ServerGroup
    from megatron_nft.engines.sleep import SleepingServers
    from megatron_nft.policy.family import ModelSpec
    from megatron_nft.policy.parallel import ParallelLayout
    from megatron_nft.weights.client import WeightClient
    from megatron_nft.weights.transport import Ledger, Transport

T = TypeVar("T")
Answers = queue.SimpleQueue[tuple[int, list[Completion] | BaseException]]
"""(number of the request, its answers or why there are none)"""

BACKOFF_S = 0.5  # before the second try, doubled for each further one
PROBE_TIMEOUT_S = 30.0  # for the question which weights a server has; a busy one is slow to answer
KEEP_ALIVE_S = 2.0  # idle connections; servers close them after 5 s, which must not happen to a request on its way
RETRIED_STATUS = frozenset({408, 425, 429})  # beside all of 5xx


class HttpEngine(ABC):
    """An engine behind one or several servers that hold the same weights. See `engine.Engine`.

    `all_urls` names the servers of every rank, for the weight sync; this rank asks those of `urls`.
    """

    def __init__(
        self,
        urls: Sequence[str],
        config: ServerConfig,
        *,
        weight_version: int,
        allow_version_change: bool = False,
        group: ServerGroup | None = None,
        sleeping: SleepingServers | None = None,
        all_urls: Sequence[str] = (),
        router: RequestRouter | None = None,
        first: int = 0,
        key: str | None = None,
    ) -> None:
        """allow_version_change: an answer may begin under `weight_version` and end under a newer one.

        group: servers that this process started, ended with the engine. sleeping: the same servers, where they share
        the trainer's GPU (rollout.server.memory_saver). router: requests go to it. first: see `targets.Targets`.
        key: what the servers and the router ask for, see `keys`.
        """
        if not urls:
            raise ValueError("an engine client needs at least one server URL")
        self.urls, self.all_urls = list(urls), list(all_urls or urls)
        self.group = group
        self.weight_version = weight_version
        self.memory_released = False
        self._sleeping = sleeping
        self._config, self._allow_version_change = config, allow_version_change
        self._router, self._key = router, key
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine-client", daemon=True)
        self._thread.start()
        self._client = httpx.AsyncClient(
            # A proxy of the environment must not see what goes to loopback.
            trust_env=False,
            headers=keys.headers(key),
            timeout=httpx.Timeout(config.request_timeout_s, connect=10.0, pool=None),
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=config.max_in_flight, keepalive_expiry=KEEP_ALIVE_S
            ),
        )
        self._targets = Targets(urls, router, self._client, self._has_wanted_weights, first)

    # ---- what an engine kind fills in

    @abstractmethod
    def _generate_call(self, request: Request, sampling: SamplingParams) -> tuple[str, dict[str, Any]]:
        """Path and JSON body that ask for all samples of a request."""

    @abstractmethod
    def _completions(self, answer: Any, request: Request, sampling: SamplingParams) -> list[Completion]:
        """The samples of an answer. Aborted, or BadAnswer (KeyError, TypeError, ... count as that too)."""

    @abstractmethod
    def _prompt_call(self, token_ids: list[int]) -> tuple[str, dict[str, Any]]:
        """Path and JSON body that ask for the log-probs of a prompt."""

    @abstractmethod
    def _prompt_logprobs(self, token_ids: list[int], answer: Any) -> list[float]:
        """Log-probs of all tokens of the prompt but the first."""

    @abstractmethod
    def _weight_client(self, url: str, timeout_s: float) -> WeightClient:
        """The client that brings weights to the server at `url`."""

    @abstractmethod
    async def _version(self, client: httpx.AsyncClient, url: str) -> int:
        """The weight version of a healthy server. httpx.HTTPError, KeyError or ValueError where it gives none."""

    # ---- the engine

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> Iterator[tuple[int, int, Completion]]:
        """See `engine.Engine.generate`. All samples of a request arrive together."""
        answers: Answers = queue.SimpleQueue()
        asking = self._submit(self._ask_all(requests, sampling, answers))

        def tell_failure(finished: Future[None]) -> None:
            error = None if finished.cancelled() else finished.exception()
            if error is not None:
                answers.put((-1, error))

        asking.add_done_callback(tell_failure)
        try:
            for _ in requests:
                number, completions = answers.get()
                if isinstance(completions, BaseException):
                    raise completions
                for sample, completion in enumerate(completions):
                    yield number, sample, completion
        finally:
            asking.cancel()  # the servers see the connections close and drop those requests

    def prompt_logprobs(self, token_ids: np.ndarray, url: str | None = None) -> np.ndarray:
        """int32 [L] -> float32 [L - 1], by the server at `url` or the first. See `engine.Engine.prompt_logprobs`."""
        target = Target((url or self.urls[0]).rstrip("/"))
        tokens = [int(t) for t in token_ids]
        path, body = self._prompt_call(tokens)
        try:
            answer = self._submit(self._post(target, path, body)).result()
            logprobs = np.array(self._prompt_logprobs(tokens, answer), dtype=np.float32)
        except (httpx.TransportError, BadAnswer, KeyError, TypeError, ValueError) as e:
            raise EngineError(self._describe([f"{target.url}: {reason(e)}"])) from None
        if len(logprobs) != len(tokens) - 1:
            raise EngineError(f"{target.url}: {len(logprobs)} prompt log-probs came for {len(tokens)} tokens")
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

    def open_transport(self, config: Config, spec: ModelSpec, layout: ParallelLayout, ledger: Ledger) -> Transport:
        """See `engine.Engine.open_transport`. Weights go to the servers of every rank."""
        clients = [self._weight_client(url, config.sync.timeout_s) for url in self.all_urls]
        kind = server_transport(config.sync.transport, self.all_urls)
        return kind(clients, self, config, spec, layout, ledger)

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
        self._submit(self._client.aclose()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self._router is not None:
            self._router.close()
        if self.group is not None:
            self.group.close()

    # ---- on the event loop

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        if self._loop.is_closed():
            coroutine.close()
            raise EngineError("the engine client is closed")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _ask_all(self, requests: Sequence[Request], sampling: SamplingParams, answers: Answers) -> None:
        """Put (number, completions or an exception) for every request, with at most max_in_flight under way."""
        await self._targets.refresh()
        numbers = iter(range(len(requests)))

        async def work() -> None:
            for number in numbers:
                try:
                    answers.put((number, await self._ask(requests[number], sampling)))
                except Exception as e:
                    answers.put((number, e))

        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(self._config.max_in_flight, len(requests))):
                tasks.create_task(work())

    async def _ask(self, request: Request, sampling: SamplingParams) -> list[Completion]:
        """All samples of one request, from whichever server. EngineError once the tries are used up."""
        path, body = self._generate_call(request, sampling)
        asked_version = self.weight_version
        problems: list[str] = []
        for attempt in range(self._config.max_retries + 1):
            if attempt:
                await asyncio.sleep(BACKOFF_S * 2 ** (attempt - 1))
                asked_version = self.weight_version
            target = await self._targets.pick()
            if target is None:
                problems.append("no server is up with the weights that are wanted")
                continue
            target.in_flight += request.num_samples
            try:
                answer = await self._post(target, path, body)
                completions = self._parse(answer, request, sampling)
            except (httpx.TransportError, BadAnswer) as e:
                target.down = True
                problems.append(f"{target.url}: {reason(e)}")
            except Aborted as e:
                problems.append(f"{target.url}: aborted ({e})")
            else:
                try:
                    check_versions(completions, asked_version, self._allow_version_change, target.url)
                except WeightVersionError as e:
                    # A server that died and came back has no current weights; another may have them.
                    target.down = True
                    if attempt == self._config.max_retries or self._targets.exhausted:
                        raise
                    problems.append(str(e))
                    continue
                return completions
            finally:
                target.in_flight -= request.num_samples
        raise EngineError(self._describe(problems))

    async def _has_wanted_weights(self, url: str) -> bool:
        try:
            return await self._version(self._client, url) == self.weight_version
        except (httpx.HTTPError, KeyError, ValueError):
            return False

    async def _post(self, target: Target, path: str, body: dict[str, Any]) -> Any:
        """The JSON answer. BadAnswer where another try may help, EngineError where the request itself is refused."""
        response = await self._client.post(target.url + path, json=body)
        if response.status_code >= 500 or response.status_code in RETRIED_STATUS:
            raise BadAnswer(f"HTTP {response.status_code}: {response.text[:500]}")
        if response.status_code != 200:
            raise EngineError(
                f"{target.url}{path} refused a request: HTTP {response.status_code}: {response.text[:500]}"
            )
        try:
            return response.json()
        except ValueError:
            raise BadAnswer(f"an answer that is not JSON: {response.text[:200]!r}") from None

    def _parse(self, answer: Any, request: Request, sampling: SamplingParams) -> list[Completion]:
        try:
            completions = self._completions(answer, request, sampling)
        except (KeyError, TypeError, ValueError, IndexError) as e:
            raise BadAnswer(f"an answer of another form than expected ({type(e).__name__}: {e})") from None
        check_completions(completions, request.num_samples)
        return completions

    def _describe(self, problems: list[str]) -> str:
        text = f"no answer after {len(problems)} tries (rollout.server.max_retries): {'; '.join(problems)}"
        failures = self.group.failures() if self.group is not None else ""
        return f"{text}\n{failures}" if failures else text
