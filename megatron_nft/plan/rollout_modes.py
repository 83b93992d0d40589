"""How long a step takes in each mode of the rollouts: a discrete-event simulation of engines and trainer.

    synchronous   the questions of a batch are answered to their end, then the trainer works, on the same devices
    streaming     the phase of generation ends when the step's groups are decided; what is under way goes on in the
                  next step with the tokens that it has
    overlapped    engines have devices of their own and answer while the trainer trains; new weights are swapped in
                  under running answers, whose keys and values are read in again

Groups train in the order in which their questions were drawn, so speed and length of an answer decide nothing. A
question is started only while fewer groups than the window are kept or may be kept before it, of those under way the
share that was kept so far. The window is (max_staleness + 1) x N groups where N train in a step and generation stands
meanwhile, max_staleness x N where it goes on: so nearly all groups train within max_staleness steps of their first
token. What would be older is dropped; whether that happens hangs on its place in the order, not on its length.

Lengths are log-normal with the given mean and spread, cut at the longest answer; the answers of a question are
independent. Whether a group is kept is drawn by itself.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from megatron_nft.plan.decoding import Answer, DecodeModel, Fleet

LENGTH_SPREAD = 0.8
"""Standard deviation of the logarithm of an answer's length, where none is given."""
MODES = ("synchronous", "streaming", "overlapped")


@dataclass(frozen=True)
class Machine:
    """Engines and trainer of one mode."""

    engines: int
    model: DecodeModel
    train_s: float  # a training step without generation: log-probs, updates, and what wakes and stops the engines
    sync_s: float


@dataclass(frozen=True)
class Demand:
    """What a run asks of them."""

    questions_per_step: int
    questions_per_batch: int  # synchronous: as many are answered at a time
    answers_per_question: int
    kept_share: float
    mean_response_tokens: float
    max_response_tokens: int
    prompt_tokens: float
    max_staleness: int
    spread: float = LENGTH_SPREAD


@dataclass
class ModeResult:
    """Means over the simulated steps; ages are shares of the trained groups by the age of their oldest token."""

    step_s: float
    engines_idle: float
    trainer_idle: float
    dropped: float  # share of the kept groups that grew too old
    ages: dict[int, float]


class _Questions:
    """Draws questions, and knows which groups are decided, kept and trained."""

    def __init__(self, demand: Demand, seed: int) -> None:
        self._demand, self._rng = demand, np.random.default_rng(seed)
        self._mu = log_mean(demand)
        self._left: dict[int, int] = {}  # answers that a started group lacks
        self._kept: dict[int, bool] = {}  # of decided groups that are not trained yet
        self._order: deque[int] = deque()  # draws, from the first that is not trained
        self._oldest: dict[int, int] = {}  # version of the oldest token
        self._drawn = self._decided = self._num_kept = 0
        self._waiting = 0  # groups that are kept and not trained
        self.dropped = 0

    @property
    def ahead(self) -> float:
        """Groups that a question drawn now would have to wait for, as far as can be known."""
        share = (self._num_kept + 1) / (self._decided + 1)  # as if one had been kept: never 0
        return self._waiting + share * len(self._left)

    def draw(self) -> list[Answer]:
        d = self._demand
        draws = np.exp(self._rng.normal(self._mu, d.spread, d.answers_per_question))
        lengths = np.clip(np.rint(draws), 1, d.max_response_tokens).astype(int)
        draw, self._drawn = self._drawn, self._drawn + 1
        self._left[draw] = d.answers_per_question
        self._order.append(draw)
        return [Answer(draw, int(length), d.prompt_tokens / d.answers_per_question) for length in lengths]

    def end(self, answers: list[Answer]) -> None:
        """Note answers that have ended."""
        for answer in answers:
            draw = answer.draw
            self._oldest[draw] = min(answer.version, self._oldest.get(draw, answer.version))
            self._left[draw] -= 1
            if not self._left[draw]:
                del self._left[draw]
                self._kept[draw] = bool(self._rng.random() < self._demand.kept_share)
                self._decided += 1
                self._num_kept += self._kept[draw]
                self._waiting += self._kept[draw]

    def forget_old(self, version: int) -> None:
        """Drop kept groups that would be too old to train under weights of `version`."""
        for draw, kept in self._kept.items():
            if kept and version - self._oldest[draw] > self._demand.max_staleness:
                self._kept[draw] = False
                self._waiting -= 1
                self.dropped += 1

    def ready(self) -> bool:
        """Whether the next step's groups are decided: in draw order, none of them under way."""
        kept = 0
        for draw in self._order:
            if draw in self._left:
                return False
            kept += self._kept[draw]
            if kept == self._demand.questions_per_step:
                return True
        return False

    def train(self, version: int, ages: Counter[int]) -> None:
        """Take the next step's groups; their ages are counted from `version`, that of the trainer's weights."""
        kept = 0
        while kept < self._demand.questions_per_step:
            draw = self._order.popleft()
            oldest = self._oldest.pop(draw)
            if self._kept.pop(draw):
                kept += 1
                ages[version - oldest] += 1
        self._waiting -= kept

    def forget(self) -> None:
        """Throw away what is decided and not trained, as synchronous runs without staleness do."""
        self._order.clear()
        self._kept.clear()
        self._oldest.clear()
        self._waiting = 0


def log_mean(demand: Demand) -> float:
    """Return mu of a log-normal whose mean, once cut at the longest answer, is the demanded one.

    E[min(X, c)] = exp(mu + s^2/2) Phi((ln c - mu - s^2) / s) + c (1 - Phi((ln c - mu) / s)); rising in mu, so bisected.
    """
    s, cap = demand.spread, demand.max_response_tokens

    def mean(mu: float) -> float:
        normal = [
            0.5 * math.erfc(-x / math.sqrt(2)) for x in ((math.log(cap) - mu - s * s) / s, (math.log(cap) - mu) / s)
        ]
        return math.exp(mu + s * s / 2) * normal[0] + cap * (1 - normal[1])

    low, high = 0.0, math.log(cap) + 20 * s
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < demand.mean_response_tokens else (low, middle)
    return low


def simulate(
    mode: str, machine: Machine, demand: Demand, *, steps: int = 20, warm_up: int = 5, seed: int = 0
) -> ModeResult:
    """Simulate `warm_up` and then `steps` training steps; the first are left out of the result.

    ValueError for an unknown mode and for a max_staleness that the mode cannot have.
    """
    if mode not in MODES:
        raise ValueError(f"rollout mode {mode}: must be one of {', '.join(MODES)}")
    if mode != "synchronous" and demand.max_staleness < 1:
        raise ValueError(
            f"rollout.max_staleness={demand.max_staleness}: {mode} trains answers that other weights began, "
            "so it needs at least 1"
        )
    runs: dict[str, Callable[[Machine, Demand, int], _Run]]
    runs = {"synchronous": _Synchronous, "streaming": _Streaming, "overlapped": _Overlapped}
    run = runs[mode](machine, demand, seed)
    for _ in range(warm_up):
        run.step()
    run.ages.clear()
    run.questions.dropped = 0
    start, busy, trained = run.fleet.time, run.fleet.busy_s, run.trained_s
    for _ in range(steps):
        run.step()
    seconds, total = run.fleet.time - start, sum(run.ages.values())
    return ModeResult(
        step_s=seconds / steps,
        engines_idle=1 - (run.fleet.busy_s - busy) / (seconds * machine.engines),
        trainer_idle=1 - (run.trained_s - trained) / seconds,
        dropped=run.questions.dropped / (total + run.questions.dropped),
        ages={age: count / total for age, count in sorted(run.ages.items())},
    )


@dataclass
class _Run(ABC):
    """Engines, trainer and questions of one mode; a subclass says what a step is."""

    machine: Machine
    demand: Demand
    seed: int
    ages: Counter[int] = field(default_factory=Counter)
    version: int = 0
    trained_s: float = 0.0  # seconds in which the trainer worked

    def __post_init__(self) -> None:
        self.fleet = Fleet.of(self.machine.model, self.machine.engines)
        self.questions = _Questions(self.demand, self.seed)

    @abstractmethod
    def step(self) -> None:
        """Go on to the end of the next training step."""

    def _go_on(self) -> None:
        """To the end of the next answer."""
        self.questions.end(self.fleet.advance(self.fleet.next_time(), self.version))
        self.questions.forget_old(self.version)

    def _train(self) -> None:
        """Train with the engines standing."""
        self.questions.train(self.version, self.ages)
        self.fleet.sleep(self.machine.train_s + self.machine.sync_s)
        self.trained_s += self.machine.train_s + self.machine.sync_s
        self._next_version()

    def _next_version(self) -> None:
        self.version += 1
        self.questions.forget_old(self.version)


class _Synchronous(_Run):
    def step(self) -> None:
        while not self.questions.ready():
            for _ in range(self.demand.questions_per_batch):
                self.fleet.add(self.questions.draw(), self.version)
            while not self.fleet.idle:
                self._go_on()
        self._train()
        if not self.demand.max_staleness:
            self.questions.forget()


class _Streaming(_Run):
    def step(self) -> None:
        window = (self.demand.max_staleness + 1) * self.demand.questions_per_step
        self.fleet.add((), self.version)  # what was stopped goes on first
        while True:
            while self.questions.ahead < window:
                self.fleet.add(self.questions.draw(), self.version)
            if self.questions.ready():
                break
            self._go_on()
        self.fleet.stop_all()
        self._train()


class _Overlapped(_Run):
    def step(self) -> None:
        while not self.questions.ready():
            self._fill()
            self._go_on()
        self.questions.train(self.version, self.ages)
        end = self.fleet.time + self.machine.train_s
        while True:
            self._fill()
            if self.fleet.next_time() > end:
                break
            self._go_on()
        self.fleet.advance(end, self.version)
        self.fleet.stop_all()  # keys and values of the old weights are not kept
        self.fleet.sleep(self.machine.sync_s)
        self._next_version()
        self.trained_s += self.machine.train_s + self.machine.sync_s
        self.fleet.add((), self.version)

    def _fill(self) -> None:
        while self.questions.ahead < self.demand.max_staleness * self.demand.questions_per_step:
            self.fleet.add(self.questions.draw(), self.version)
