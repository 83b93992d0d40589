"""What a server's answer must be before it counts as one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_nft.engines.engine import Completion, WeightVersionError


class Aborted(Exception):
    """The server gave a request up because it was told to; the request is to be made again."""


class BadAnswer(Exception):
    """A server's answer that lacks what was asked for."""


def integer_version(text: str) -> int:
    """Return a server's version, which it gives as a string, as our integer; -1 for one that we did not give."""
    try:
        return int(text)
    except ValueError:
        return -1


def check_completions(completions: Sequence[Completion], num_samples: int) -> None:
    """BadAnswer unless there are `num_samples` answers, each with tokens and a finite log-prob for every one."""
    if len(completions) != num_samples:
        raise BadAnswer(f"{len(completions)} answers came in place of {num_samples}")
    for c in completions:
        if not len(c.token_ids) == len(c.logprobs) > 0:
            raise BadAnswer(f"an answer of {len(c.token_ids)} tokens came with {len(c.logprobs)} log-probs")
        if not np.isfinite(c.logprobs).all():
            raise BadAnswer("an answer came with log-probs that are not finite")


def check_versions(completions: Sequence[Completion], asked: int, allow_change: bool, url: str) -> None:
    """WeightVersionError where an answer of the server at `url` is of another version than `asked`.

    allow_change: it may end under a newer version than it began under, if that is not older than `asked`.
    """
    for c in completions:
        first = c.weight_version_spans[0][0] if c.weight_version_spans else c.weight_version
        same = first == c.weight_version == asked
        if not same and not (allow_change and asked <= first <= c.weight_version):
            raise WeightVersionError(f"{url} answered under weight version {c.weight_version}, asked was {asked}")
