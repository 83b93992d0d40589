"""What a server's answer must be before it counts as one."""

from __future__ import annotations

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


def check_completion(completion: Completion) -> None:
    """BadAnswer unless the answer has tokens, and a finite log-prob for every one."""
    if not len(completion.token_ids) == len(completion.logprobs) > 0:
        raise BadAnswer(
            f"an answer of {len(completion.token_ids)} tokens came with {len(completion.logprobs)} log-probs"
        )
    if not np.isfinite(completion.logprobs).all():
        raise BadAnswer("an answer came with log-probs that are not finite")


def check_version(completion: Completion, asked: int, allow_change: bool, url: str) -> None:
    """WeightVersionError where an answer of the server at `url` is of another version than `asked`.

    allow_change: it may end under a newer version than it began under, if that is not older than `asked`.
    """
    spans, last = completion.weight_version_spans, completion.weight_version
    first = spans[0][0] if spans else last
    if not first == last == asked and not (allow_change and asked <= first <= last):
        raise WeightVersionError(f"{url} answered under weight version {last}, asked was {asked}")
