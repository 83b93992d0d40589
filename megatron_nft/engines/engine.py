"""What the rest of the project sees of an inference engine.

An engine takes all questions of a phase at once and hands answers back one by one as they finish, so that grading runs
while generation goes on. The calls are plain blocking ones: an engine behind HTTP keeps its many requests in flight on
a thread of its own, the embedded engine decodes between two answers.

    for request, sample, completion in engine.generate(requests, sampling):
        ...  # requests[request], answer number `sample` of it

Leaving the loop early (an exception, Ctrl-C) abandons what is under way. So that this need not wait for the next
answer, and a caller with other duties can see to them meanwhile, `generate` calls its `on_wait` between two answers.

A stream takes answers one by one, while others are under way, and can stop them all: what was generated is handed back,
and goes on later, perhaps under other weights, as the prefix of a new request.

    with engine.stream(sampling) as stream:
        stream.add([AnswerRequest(number, prompt_ids, seed_key, prefix), ...])
        for number, completion in stream.advance().ended:
            ...
        for number, completion in stream.stop():  # finish_reason "stopped" where it has not ended
            ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    import numpy as np
    import torch
    import torch.distributed as dist

    from megatron_nft.config import Config
    from megatron_nft.policy.family import ModelSpec
    from megatron_nft.policy.parallel import ParallelLayout
    from megatron_nft.weights.transport import Ledger, Transport

NO_WEIGHTS = -1
"""Weight version of an engine that waits for its first sync."""
OnWait = Callable[[bool], None]
"""Called on the caller's thread while it waits for an answer, about every WAIT_S seconds, with whether the engine has
made progress since the last call. An exception that it raises leaves the loop."""
WAIT_S = 0.5
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
"""policy.precision -> dtype of an engine whose own is not set."""


class EngineError(RuntimeError):
    """An engine that does not come up, dies, or answers with an error once the retries are used up."""


class WeightVersionError(EngineError):
    """An answer that was made under other weights than asked for."""


class WeightUpdateError(EngineError):
    """Weights that an engine cannot take: an unknown, missing or repeated tensor, another shape or dtype."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How answers are drawn. The defaults draw from the model's plain distribution."""

    max_tokens: int  # response tokens, end token included
    temperature: float = 1.0  # 0 is greedy; log-probs are then those at temperature 1
    top_p: float = 1.0
    top_k: int = -1  # -1 means all tokens
    stop_token_ids: tuple[int, ...] = ()  # end an answer too, beside the model's own; they belong to it

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: must be at least 1")
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature}: must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be in (0, 1]")
        if self.top_k == 0 or self.top_k < -1:
            raise ValueError(f"top_k={self.top_k}: must be -1 (all tokens) or at least 1")


@dataclass(frozen=True, slots=True)
class Request:
    """One question, and how many answers it gets."""

    prompt_ids: np.ndarray  # int32 [P]
    num_samples: int  # K
    seed_key: tuple[int, ...]  # with the sample's number it fixes the random numbers, where the engine allows it


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer as the engine gave it."""

    token_ids: np.ndarray  # int32 [R], end token included where it was produced
    logprobs: np.ndarray  # float32 [R], at the sampling temperature, before any top-p or top-k cut
    finish_reason: str  # stop | length | stopped (by us: it has not ended, and may have no tokens yet)
    weight_version: int  # version under which the answer ended
    weight_version_spans: tuple[tuple[int, int, int], ...] = ()  # (version, start, end) where an update fell inside


@dataclass(frozen=True, slots=True)
class AnswerRequest:
    """One answer of a stream: from its beginning, or from what there is of it."""

    number: int  # the caller's
    prompt_ids: np.ndarray  # int32 [P]
    seed_key: tuple[int, ...]  # with the position it fixes each token's random number, where the engine allows it
    prefix: Completion | None = None  # goes on from here; its tokens count in SamplingParams.max_tokens


@dataclass(frozen=True, slots=True)
class Advance:
    """What a stream has to tell after a while."""

    ended: list[tuple[int, Completion]]  # (number of the request, the whole answer with its prefix)
    moved: bool  # whether the engine has made progress
    begun: list[tuple[int, Completion]] = field(default_factory=list)
    """Answers that go on, as far as they are known: where a server gave them up, for a weight sync for example."""


class AnswerStream(Protocol):
    """Answers under way in an engine, which come and go one by one. Leaving its `with` block abandons them."""

    def add(self, requests: Sequence[AnswerRequest]) -> None:
        """Start answers as soon as there is room for them, in the order in which they were added."""
        ...

    def advance(self, *, at_once: bool = False) -> Advance:
        """Go on for a fixed number of tokens (the embedded engine) or a fixed time (servers), or tell `at_once` what
        there is to tell. EngineError where an answer cannot be had."""
        ...

    def interrupt(self) -> None:
        """Have what there is of answers under way told by the next `advance`; they go on. Where a server does not say
        it soon, an answer stays as far as it was known."""
        ...

    def stop(self) -> list[tuple[int, Completion]]:
        """End all answers, and hand back each that has a token; those that end at that moment as they ended."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class Ranks(Protocol):
    """The part of `policy.parallel.ParallelLayout` that engines use."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def world_gloo(self) -> dist.ProcessGroup | None:
        """Group of all ranks, host memory. None where this process is the only one."""
        ...


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """How an engine is opened, whatever its kind."""

    precision: str  # fp32 | bf16, of an engine whose dtype is not set
    log_dir: Path  # where servers that are started write
    layout: Ranks | None  # None: this process is the only rank
    load_weights: bool  # False: no answers are given until a weight sync has brought a version
    allow_version_change: bool  # an answer may begin under one version and end under a newer one


class Engine(Protocol):
    """An engine that holds some version of the policy's weights."""

    weight_version: int
    """Version that answers must come from; set by the weight sync. NO_WEIGHTS before the first one."""

    def generate(
        self, requests: Sequence[Request], sampling: SamplingParams, on_wait: OnWait | None = None
    ) -> Iterator[tuple[int, int, Completion]]:
        """Yields (number of the request, number of the sample, answer), in the order in which answers finish.

        Every sample of every request comes exactly once. EngineError where that cannot be had. A caller with `on_wait`
        also brings the weights to the servers that `left_behind` names.
        """
        ...

    def stream(self, sampling: SamplingParams) -> AnswerStream:
        """Answers one by one, under the version that the engine has. The embedded engine has one stream at a time."""
        ...

    is_deterministic: bool
    """Whether the same requests, added between the same calls of `advance`, end at the same calls with the same tokens.
    """

    def left_behind(self) -> list[str]:
        """URLs of servers that work without the wanted weights, as far as this rank has asked them: they died and were
        started again. Any thread may call it, while answers are generated too; an engine without servers has none."""
        ...

    def note_good_step(self) -> None:
        """Take note that a training step was completed: the bound on restarts of servers counts anew."""
        ...

    def prompt_logprobs(self, token_ids: np.ndarray) -> np.ndarray:
        """Log-probs of token_ids[1:], each given the tokens before it, temperature 1: int32 [L] -> float32 [L - 1]."""
        ...

    def open_transport(self, config: Config, spec: ModelSpec, layout: ParallelLayout, ledger: Ledger) -> Transport:
        """This rank's transport of weights into the engine. Collective. See `weights.transport`."""
        ...

    memory_released: bool
    """Whether `release_memory` was called, and no `resume_memory` since. Alike on all ranks that do both together."""

    def release_memory(self) -> None:
        """Gives the memory that the engine shares with the trainer to the trainer. Local: no rank waits for another.

        All answers must have arrived. Does nothing for an engine that keeps its memory (rollout.server.memory_saver is
        off, or the engine is embedded).
        """
        ...

    def resume_memory(self) -> None:
        """Takes the memory back; does nothing unless it was released. The engine then needs a weight sync. Local."""
        ...

    def close(self) -> None:
        """Ends what the engine started. May be called twice."""
        ...
