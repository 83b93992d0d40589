"""Work that goes on beside the training, one piece at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """A thread for one piece of work at a time. Its error is kept until somebody waits for it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def running(self) -> bool:
        """Whether work is under way."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, work: Callable[[], object]) -> None:
        """Begin `work`. What was begun before must have been waited for."""
        assert self._thread is None, f"{self._name} is still at work"
        # A daemon: a process that has to end must not hang on a disk that does not answer.
        self._thread = threading.Thread(target=self._run, args=(work,), name=self._name, daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> BaseException | None:
        """Return the error of the work once it has ended, or None; also None where it goes on after `timeout_s`."""
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                return None
        error, self._thread, self._error = self._error, None, None
        return error

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error
