"""Grading in worker processes that can be killed.

Invariants:
- every submitted row gets exactly one `Graded`, or an exception that says why grading is impossible at all;
- a row that exceeds its time or memory, or crashes its worker, costs that worker and nothing else: the rows queued
  behind it are graded by another worker;
- no process outlives the pool's owner, however the owner ends.
"""

from __future__ import annotations

import itertools
import pickle
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from megatron_nft.verify.dispatch import START_TIMEOUT_S, Dispatcher
from megatron_nft.verify.graders import split_names
from megatron_nft.verify.inbox import Inbox, PendingAnswer, VerifierError
from megatron_nft.verify.outcome import Graded
from megatron_nft.verify.thinking import with_opened

if TYPE_CHECKING:
    from megatron_nft.config import VerifyConfig


class VerifierPool:
    """Grades answers with the graders of `config` in `config.workers` processes.

    `submit` may be called from any thread; in asyncio, await `asyncio.wrap_future(pool.submit(...))`.

    Raises GraderError for an unknown grader name. A dotted path that cannot be imported gives a VerifierError from the
    futures and from `wait_ready`, because only the worker processes import it.
    """

    def __init__(self, config: VerifyConfig) -> None:
        self._names = split_names(config.grader)
        self._config = config
        self._ids = itertools.count()
        self._inbox = Inbox()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="verifier-pool", daemon=True)
        self._thread.start()

    def submit(
        self,
        response: str,
        answer: str,
        data_source: str = "",
        extra: dict[str, Any] | None = None,
        *,
        prompt_opens_thinking: bool = False,
    ) -> Future[Graded]:
        """Queue one answer for grading.

        response: the model's whole text. answer: the reference. data_source, extra: handed to the graders.
        prompt_opens_thinking: the prompt ends in `<think>` (see `thinking.opens_thinking`), so that the response counts
        only from its `</think>`; the graders find this in `extra`.

        Raises TypeError unless both texts are strings, pickle's error for an `extra` that cannot be sent to another
        process, and VerifierError once the pool is closed.
        """
        if not isinstance(response, str) or not isinstance(answer, str):
            raise TypeError(
                f"response and answer must be strings, not {type(response).__name__} and {type(answer).__name__}"
            )
        if prompt_opens_thinking:
            extra = with_opened(extra)
        row = PendingAnswer(next(self._ids), pickle.dumps((response, answer, data_source, extra)), Future())
        self._inbox.put(row)
        return row.future

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until the graders are loaded. Raises VerifierError if they cannot be."""
        if not self._ready.wait(timeout_s):
            raise VerifierError(f"the verifier's processes were not up after {timeout_s:g} s")
        if self._inbox.failure is not None:
            raise VerifierError(str(self._inbox.failure)) from self._inbox.failure

    def close(self) -> None:
        """End all processes. Futures that are not done get a VerifierError. May be called more than once."""
        self._inbox.close()
        self._thread.join()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        """Run the pool's thread, which is also the parent of its processes."""
        dispatcher = Dispatcher(self._config, self._names, self._inbox, self._ready)
        try:
            dispatcher.run()
            failure = VerifierError("the verifier pool was closed before this answer was graded")
        except VerifierError as error:
            failure = error
        except Exception as error:
            failure = VerifierError(f"the verifier pool failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
        rows = dispatcher.rows_in_progress()
        dispatcher.close()
        self._inbox.fail(failure, rows)
        self._ready.set()
