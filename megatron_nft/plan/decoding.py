"""Engines that decode answers, event by event: continuous batching, limits of memory, answers stopped and resumed.

All answers of an engine advance by one token per decode step, so an engine's clock counts decode steps and an answer is
done when the clock reaches the step at which it started plus the tokens it lacks. Between two events the clock is
linear in time.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class DecodeModel:
    """What one engine can do; seconds."""

    max_rows: int  # answers decoded at once
    weights_s: float  # to read the weights once
    context_s: float  # to read the keys and values of one token
    row_s: float  # for the FLOPs of one token
    overhead_s: float  # of one decode step: launches and reductions
    prefill_s: float  # per token of a prompt or of a prefix that is read in

    def step_s(self, rows: float, context: float) -> float:
        """Seconds of one decode step for `rows` answers that hold `context` tokens together."""
        return max(self.weights_s + self.context_s * context, rows * self.row_s) + self.overhead_s


@dataclass(eq=False)
class Answer:
    """One answer on its way."""

    draw: int
    length: int  # tokens that it will have
    prompt: float  # tokens that are read in for it before the first; a shared question counts once for its answers
    done: float = 0.0  # tokens that it has
    version: int = 0  # of the weights that gave the first token


class SimulatedEngine:
    """One engine. Its state is that at `time`; `next_time` is when the next answer ends, if nothing else happens."""

    def __init__(self, model: DecodeModel) -> None:
        self.model, self.time, self.busy_s = model, 0.0, 0.0
        self._clock = 0.0
        self._rows: list[tuple[float, int, Answer]] = []  # heap of (clock at the end, number, answer)
        self._offset = 0.0  # sum over the answers of (tokens held - clock), both at their start
        self._prefill_s = 0.0  # owed before the next token
        self._started = 0
        self.next_time = math.inf  # when the next answer ends, if nothing else happens

    @property
    def rows(self) -> int:
        return len(self._rows)

    def start(self, answer: Answer) -> None:
        """Put an answer into the batch at the engine's present time."""
        held = answer.prompt + answer.done
        self._prefill_s += held * self.model.prefill_s
        heapq.heappush(self._rows, (self._clock + answer.length - answer.done, self._started, answer))
        self._offset += held - self._clock
        self._started += 1
        self._look_ahead()

    def _look_ahead(self) -> None:
        self.next_time = self.time + self._interval()[1] if self._rows else math.inf

    def _interval(self) -> tuple[float, float]:
        """(decode steps, seconds) until the next answer ends."""
        steps = max(0.0, self._rows[0][0] - self._clock)
        context = self._offset + self.rows * (self._clock + steps / 2)
        return steps, self._prefill_s + steps * self.model.step_s(self.rows, context)

    def advance(self, time: float) -> list[Answer]:
        """Go on to `time`, at most `next_time`; return the answers that ended then."""
        spent, self.time = time - self.time, time
        if not self._rows:
            return []
        self.busy_s += spent
        ended: list[Answer] = []
        if time < self.next_time:
            self._decode(spent)
        else:
            self._clock, self._prefill_s = self._rows[0][0], 0.0
            while self._rows and self._rows[0][0] <= self._clock:
                ended.append(self._take())
            self._look_ahead()
        return ended

    def _decode(self, seconds: float) -> None:
        """Move the clock by the part of the interval that `seconds` are."""
        steps, whole = self._interval()
        decoding = whole - self._prefill_s
        read_in = min(self._prefill_s, seconds)
        self._prefill_s -= read_in
        if decoding > 0:
            self._clock += steps * (seconds - read_in) / decoding

    def _take(self) -> Answer:
        end, _, answer = heapq.heappop(self._rows)
        answer.done = answer.length - (end - self._clock)
        self._offset -= answer.prompt + answer.done - self._clock
        return answer

    def stop_all(self) -> list[Answer]:
        """Take every answer out of the batch, with the tokens that it has."""
        answers = [self._take() for _ in range(self.rows)]
        self._prefill_s, self.next_time = 0.0, math.inf
        return answers


@dataclass
class Fleet:
    """Engines that share one queue of answers."""

    engines: list[SimulatedEngine]
    queue: deque[Answer] = field(default_factory=deque)
    time: float = 0.0

    @classmethod
    def of(cls, model: DecodeModel, size: int) -> Fleet:
        return cls([SimulatedEngine(model) for _ in range(size)])

    @property
    def idle(self) -> bool:
        return not self.queue and all(e.rows == 0 for e in self.engines)

    @property
    def busy_s(self) -> float:
        """Seconds in which an engine had answers, summed over the engines."""
        return sum(e.busy_s for e in self.engines)

    def add(self, answers: Iterable[Answer], version: int) -> None:
        """Queue answers at the present time, and fill the engines: the one with the fewest answers first."""
        self.queue.extend(answers)
        while self.queue:
            engine = min(self.engines, key=lambda e: e.rows)
            if engine.rows >= engine.model.max_rows:
                return
            if engine.time < self.time:
                engine.advance(self.time)  # nothing ends before: what did was taken out
            answer = self.queue.popleft()
            if not answer.done:
                answer.version = version
            engine.start(answer)

    def next_time(self) -> float:
        """Time of the next end of an answer."""
        return min(e.next_time for e in self.engines)

    def advance(self, time: float, version: int) -> list[Answer]:
        """Go on to `time`, at most `next_time()`; return the answers that ended then. Their places are filled again."""
        ended = []
        for engine in self.engines:
            if engine.next_time <= time:
                ended += engine.advance(time)
        self.time = time
        self.add((), version)
        return ended

    def stop_all(self) -> None:
        """Put everything under way back to the front of the queue."""
        stopped = []
        for engine in self.engines:
            engine.advance(self.time)
            stopped += engine.stop_all()
        self.queue.extendleft(sorted(stopped, key=lambda a: a.draw, reverse=True))

    def sleep(self, seconds: float) -> None:
        """Let time pass with nothing under way."""
        self.time += seconds
        for engine in self.engines:
            engine.time = self.time
