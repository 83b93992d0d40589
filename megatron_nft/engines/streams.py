"""Answers of servers that come and go one by one: see `engine.AnswerStream`.

Every answer is a task on the client's event loop. It asks again, with what there is as the prefix of the prompt, as
often as a server gives it up: because it was told to by another client or stream or for a weight sync, or because it
died. Tokens go to the server as they came from it, never as text. To stop them all, servers are told to abort
everything, again and again until every request has been answered: one that was on its way is not in the server yet.
"""

from __future__ import annotations

import asyncio
import queue
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from megatron_nft.engines.completions import Stopped, joined, settled
from megatron_nft.engines.engine import Advance, AnswerRequest, Completion, Request, SamplingParams

if TYPE_CHECKING:
    from megatron_nft.engines.asking import Asker

ROUND_S = 0.25  # of a call of `advance`
ABORT_AGAIN_S = 0.2
INTERRUPT_S = 5.0  # that `interrupt` waits at most: a server that is started again may take long to answer

Submit = Callable[[Coroutine[Any, Any, None]], Future[None]]
"""Runs a coroutine on the client's event loop."""


class HttpStream:
    """See `engine.AnswerStream`. All methods are called on one thread, which is not that of the event loop."""

    def __init__(self, asker: Asker, submit: Submit, sampling: SamplingParams, max_in_flight: int) -> None:
        self._asker, self._submit, self._sampling = asker, submit, sampling
        self._max_in_flight = max_in_flight
        self._turns = asyncio.Semaphore(max_in_flight)  # taken in the order in which it is asked for
        self._answers: queue.SimpleQueue[tuple[int, Completion | BaseException | None]] = queue.SimpleQueue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._watching: asyncio.Task[None] | None = None
        self._requests: set[asyncio.Future[None]] = set()  # under way, each done when it has been answered
        self._num_open = 0  # added and not handed back
        self._of_question: Counter[int] = Counter()  # answers under way, by question
        self._begun: dict[int, Completion] = {}  # given up by a server since the last `advance`, and asked again
        self._stopping = False

    def add(self, requests: Sequence[AnswerRequest]) -> None:
        """See `engine.AnswerStream.add`."""
        if requests:
            self._num_open += len(requests)
            self._submit(self._add(requests)).result()

    def advance(self, *, at_once: bool = False) -> Advance:
        """See `engine.AnswerStream.advance`."""
        ended, deadline = [], time.monotonic() + (0.0 if at_once else ROUND_S)
        while True:
            try:
                number, completion = self._take(max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            assert completion is not None, "only `stop` ends an answer without tokens"
            ended.append((number, completion))
        begun, self._begun = self._begun, {}  # one that has ended by now comes later, and replaces this
        over = {number for number, _ in ended}
        news = [(number, answer) for number, answer in begun.items() if number not in over]
        return Advance(ended, self._asker.take_moved() or bool(ended), news)

    def interrupt(self) -> None:
        """See `engine.AnswerStream.interrupt`. Servers that keep prefixes need not compute them again."""
        self._submit(self._interrupt()).result()

    def stop(self) -> list[tuple[int, Completion]]:
        """See `engine.AnswerStream.stop`."""
        self._stopping = True
        aborting = self._submit(self._abort())
        found = []
        while self._num_open:
            number, completion = self._take(None)
            if completion is not None:
                found.append((number, completion))
        aborting.result()
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._submit(self._end()).result()

    def _take(self, timeout_s: float | None) -> tuple[int, Completion | None]:
        number, answer = self._answers.get(timeout=timeout_s)
        if isinstance(answer, BaseException):
            raise answer
        self._num_open -= 1
        return number, answer

    # ---- on the event loop

    async def _add(self, requests: Sequence[AnswerRequest]) -> None:
        if self._watching is None:
            await self._asker.begin(0)
            self._watching = asyncio.create_task(self._asker.watch())
            self._watching.add_done_callback(self._note_failure)
        self._asker.expect(self, min(self._max_in_flight, self._num_open))
        for request in requests:
            question = hash(request.prompt_ids.tobytes())  # its answers share the server that has read it
            self._of_question[question] += 1
            task = asyncio.create_task(self._make(request, question))
            task.add_done_callback(partial(self._note_end, question))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(self._note_failure)

    def _note_end(self, question: int, _: asyncio.Task[None]) -> None:
        self._of_question[question] -= 1
        if not self._of_question[question]:
            del self._of_question[question]
            self._asker.forget(question)

    async def _make(self, request: AnswerRequest, question: int) -> None:
        """Put the whole answer, or what there is of it once the stream is stopped."""
        answer = request.prefix
        async with self._turns:
            while not self._stopping:
                start = 0 if answer is None else len(answer.token_ids)
                ids = request.prompt_ids if answer is None else np.concatenate([request.prompt_ids, answer.token_ids])
                sampling = replace(self._sampling, max_tokens=self._sampling.max_tokens - start)
                asked = Request(ids, 1, request.seed_key)
                is_answered = asyncio.get_running_loop().create_future()
                self._requests.add(is_answered)
                try:
                    rest = await self._asker.ask(question, asked, sampling, lambda: not self._stopping)
                except Stopped:
                    break
                finally:
                    self._requests.discard(is_answered)
                    is_answered.set_result(None)
                answer = settled(joined(answer, rest), self._sampling)
                if answer.finish_reason != "stopped":
                    break
                if len(answer.token_ids):
                    self._begun[request.number] = answer
        self._begun.pop(request.number, None)
        has_tokens = answer is not None and len(answer.token_ids) > 0
        self._answers.put((request.number, answer if has_tokens else None))

    async def _interrupt(self) -> None:
        """Until every request that is under way now has been answered; some may not be in a server yet."""
        waiting, deadline = set(self._requests), time.monotonic() + INTERRUPT_S
        while waiting and time.monotonic() < deadline:
            await self._asker.abort_all()
            _, waiting = await asyncio.wait(waiting, timeout=ABORT_AGAIN_S)

    async def _abort(self) -> None:
        while self._tasks:
            await self._asker.abort_all()
            if tasks := set(self._tasks):  # not those that have ended meanwhile
                await asyncio.wait(tasks, timeout=ABORT_AGAIN_S)

    async def _end(self) -> None:
        tasks = [*self._tasks, *([self._watching] if self._watching else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._asker.expect(self, 0)

    def _note_failure(self, finished: asyncio.Task[None]) -> None:
        error = None if finished.cancelled() else finished.exception()
        if error is not None:
            self._answers.put((-1, error))
