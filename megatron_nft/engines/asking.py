"""The part of a client that runs on its event loop: a request for each answer, spread over servers, retried in bounds.

An answer is a request of its own, so that answers to one question can lie on several servers and are handed on as soon
as each is there. What a server does to several answers at once (a shared prompt, batching) it does to requests as well.
"""

from __future__ import annotations

import asyncio
import queue
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import httpx

from megatron_nft.engines.completions import Aborted, BadAnswer, Stopped, check_completion, check_version
from megatron_nft.engines.engine import Completion, EngineError, Request, SamplingParams, WeightVersionError
from megatron_nft.engines.reasons import reason
from megatron_nft.engines.target import State, Target
from megatron_nft.engines.targets import Targets
from megatron_nft.engines.watch import Watch

if TYPE_CHECKING:
    from megatron_nft.config import ServerConfig
    from megatron_nft.engines.server import ServerGroup

Answers = queue.SimpleQueue[tuple[int, int, Completion | BaseException]]
"""(number of the request, number of the sample, the answer or why there is none)"""

Wanted = Callable[[], bool]

ABORT_TIMEOUT_S = 10.0
BACKOFF_S = 0.5  # before the second try, doubled for each further one
RETRIED_STATUS = frozenset({408, 425, 429})  # beside all of 5xx


class Asker(ABC):
    """Asks servers for answers. `client.HttpEngine` makes an engine of it."""

    group: ServerGroup | None
    _config: ServerConfig
    _patience_s: float  # for a server that is started again
    _client: httpx.AsyncClient
    _targets: Targets
    _watch: Watch
    _is_helped: bool  # the caller brings weights to servers that came back without them
    _allow_version_change: bool

    @property
    @abstractmethod
    def weight_version(self) -> int:
        """Version that answers must come from."""

    # ---- what an engine kind fills in

    @abstractmethod
    def _generate_call(self, request: Request, sampling: SamplingParams) -> tuple[str, dict[str, Any]]:
        """Path and JSON body that ask for one sample of a request."""

    @abstractmethod
    def _completion(self, answer: Any) -> Completion:
        """The sample in a server's answer, `stopped` where the server was told to abort it. BadAnswer (KeyError,
        TypeError, ... count as that too)."""

    @abstractmethod
    def _abort_call(self) -> tuple[str, dict[str, Any]]:
        """Path and JSON body that make a server give up all requests, and answer each with what it has of it."""

    @abstractmethod
    async def _version(self, client: httpx.AsyncClient, url: str) -> int:
        """The weight version of a healthy server. httpx.HTTPError, KeyError or ValueError where it gives none."""

    @abstractmethod
    async def _progress(self, client: httpx.AsyncClient, url: str) -> float:
        """A sign that a server with requests works on them: see `watch.ProgressQuery`."""

    # ----

    async def _ask_all(self, requests: Sequence[Request], sampling: SamplingParams, answers: Answers) -> None:
        """Put (request, sample, answer or an exception) for every sample, with at most max_in_flight under way."""
        num_in_flight = min(self._config.max_in_flight, sum(request.num_samples for request in requests))
        samples = ((number, k) for number, request in enumerate(requests) for k in range(request.num_samples))
        await self._targets.begin(num_in_flight)

        async def work() -> None:
            for number, sample in samples:
                try:
                    answers.put((number, sample, await self.ask(number, requests[number], sampling)))
                except Exception as e:
                    answers.put((number, sample, e))

        watching = asyncio.create_task(self._watch.run())
        watching.add_done_callback(lambda task: _tell(task, answers))
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(num_in_flight):
                    tasks.create_task(work())
        finally:
            watching.cancel()

    async def ask(
        self, number: int, request: Request, sampling: SamplingParams, wanted: Wanted | None = None
    ) -> Completion:
        """One sample of request `number`, from whichever server. EngineError once the tries are used up.

        wanted: takes an answer that a server gave up as it is, too, and is asked before each try whether the answer is
        still wanted (Stopped where it is not).
        """
        path, body = self._generate_call(request, sampling)
        problems: list[str] = []
        for attempt in range(self._config.max_retries + 1):
            if attempt:
                await asyncio.sleep(BACKOFF_S * 2 ** (attempt - 1))
            target = await self._server_for(number, problems, wanted)
            asked_version = self.weight_version
            target.in_flight += 1
            try:
                completion = self._parse(await self._post_for_long(target, path, body))
                if completion.finish_reason == "stopped" and wanted is None:
                    raise Aborted
            except TimeoutError:
                limit = self._config.stall_timeout_s
                problems.append(f"{target.url}: no progress for {limit:g} s (rollout.server.stall_timeout_s)")
            except (httpx.TransportError, BadAnswer) as e:
                target.down = True
                problems.append(f"{target.url}: {reason(e)}")
            except Aborted:
                problems.append(f"{target.url}: aborted")
            else:
                target.answered += 1
                try:
                    check_version(completion, asked_version, self._allow_version_change, target.url)
                except WeightVersionError as e:
                    # A server that died and came back has no current weights; another may have them.
                    target.down = True
                    if attempt == self._config.max_retries or (self._targets.exhausted and not self._is_helped):
                        raise
                    problems.append(str(e))
                    continue
                return completion
            finally:
                target.in_flight -= 1
        raise EngineError(self._describe(problems))

    async def begin(self, num_in_flight: int) -> None:
        """See `targets.Targets.begin`."""
        await self._targets.begin(num_in_flight)

    def expect(self, stream: object, num_in_flight: int) -> None:
        """See `targets.Targets.expect`."""
        self._targets.expect(stream, num_in_flight)

    def forget(self, question: int) -> None:
        """See `targets.Targets.forget`."""
        self._targets.forget(question)

    async def watch(self) -> None:
        """Watch the servers until cancelled: see watch.py."""
        await self._watch.run()

    def take_moved(self) -> bool:
        """Whether any server has made progress since the last call. Any thread may call it."""
        return self._watch.take_moved()

    async def abort_all(self) -> None:
        """Tell the servers to give up all requests. One that does not answer is left to the watch."""
        path, body = self._abort_call()
        calls = (self._client.post(url + path, json=body, timeout=ABORT_TIMEOUT_S) for url in self._targets.busy)
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(outcome, BaseException) and not isinstance(outcome, httpx.HTTPError):
                raise outcome

    async def _server_for(self, number: int, problems: list[str], wanted: Wanted | None) -> Target:
        """The server for a sample of request `number`; where none is up, the first that comes back.

        EngineError where none does within rollout.server.start_timeout_s, or none is started again. One that is back
        and only lacks the weights is waited for where answers outlive a phase (`wanted`): the next sync brings them,
        after training of any length. Stopped where the answer is not `wanted` any more.
        """
        clock = asyncio.get_running_loop().time
        start = clock()
        while True:
            if wanted is not None and not wanted():
                raise Stopped
            target = await self._targets.pick(number)
            if wanted is not None and not wanted():
                raise Stopped
            if target is not None:
                return target
            waited_s = clock() - start
            only_lacks_weights = wanted is not None and bool(self._targets.behind)
            given_up = self.group is not None and self.group.given_up
            if given_up or (waited_s > self._patience_s and not only_lacks_weights):
                problems.append(f"no server was up with the weights that are wanted, after {waited_s:.0f} s")
                raise EngineError(self._describe(problems))
            if only_lacks_weights:
                start = clock()  # no sign of progress: a phase that waits for weights in vain has stalled
            else:
                self._watch.note()  # there is a bound

    async def _post_for_long(self, target: Target, path: str, body: dict[str, Any]) -> Any:
        """See `_post`. TimeoutError once the server is given up; until then an answer may take as long as it takes."""
        async with asyncio.timeout(None) as wait:
            target.waits.add(wait)
            try:
                return await self._post(target.url, path, body)
            finally:
                target.waits.discard(wait)

    async def _post(self, url: str, path: str, body: dict[str, Any]) -> Any:
        """The JSON answer. BadAnswer where another try may help, EngineError where the request itself is refused."""
        response = await self._client.post(url + path, json=body)
        if response.status_code >= 500 or response.status_code in RETRIED_STATUS:
            raise BadAnswer(f"HTTP {response.status_code}: {response.text[:500]}")
        if response.status_code != 200:
            raise EngineError(f"{url}{path} refused a request: HTTP {response.status_code}: {response.text[:500]}")
        try:
            return response.json()
        except ValueError:
            raise BadAnswer(f"an answer that is not JSON: {response.text[:200]!r}") from None

    def _parse(self, answer: Any) -> Completion:
        try:
            completion = self._completion(answer)
        except (KeyError, TypeError, ValueError, IndexError) as e:
            raise BadAnswer(f"an answer of another form than expected ({type(e).__name__}: {e})") from None
        check_completion(completion)
        return completion

    async def _state(self, url: str) -> State:
        """See `target.StateQuery`."""
        try:
            version = await self._version(self._client, url)
            await self._progress(self._client, url)  # one that hangs may still say its version
        except httpx.ConnectError:
            return State.GONE
        except (httpx.HTTPError, KeyError, ValueError):
            return State.SILENT
        return State.READY if version == self.weight_version else State.BEHIND

    def _describe(self, problems: Sequence[str]) -> str:
        text = f"no answer after {len(problems)} tries (rollout.server.max_retries): {'; '.join(problems)}"
        failures = self.group.failures() if self.group is not None else ""
        return f"{text}\n{failures}" if failures else text


def _tell(finished: asyncio.Task[None], answers: Answers) -> None:
    """Hand an error of a background task to whoever waits for answers: nobody else would see it."""
    error = None if finished.cancelled() else finished.exception()
    if error is not None:
        answers.put((-1, -1, error))
