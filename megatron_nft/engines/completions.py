"""What a server's answer must be before it counts as one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from megatron_nft.engines.engine import Completion, SamplingParams, WeightVersionError


class Aborted(Exception):
    """The server gave a request up because it was told to; the request is to be made again."""


class Stopped(Exception):
    """The caller wants no more of an answer that no server is making at the moment."""


class BadAnswer(Exception):
    """A server's answer that lacks what was asked for."""


def integer_version(text: str) -> int:
    """Return a server's version, which it gives as a string, as our integer; -1 for one that we did not give."""
    try:
        return int(text)
    except ValueError:
        return -1


def check_completion(completion: Completion) -> None:
    """BadAnswer unless the answer has tokens (one that was stopped may have none), and finite log-probs of all."""
    least = 0 if completion.finish_reason == "stopped" else 1
    if not len(completion.token_ids) == len(completion.logprobs) >= least:
        raise BadAnswer(
            f"an answer of {len(completion.token_ids)} tokens came with {len(completion.logprobs)} log-probs"
        )
    if not np.isfinite(completion.logprobs).all():
        raise BadAnswer("an answer came with log-probs that are not finite")


def version_spans(completion: Completion) -> tuple[tuple[int, int, int], ...]:
    """(version, start, end) of every token, also where the whole answer has one version."""
    whole = ((completion.weight_version, 0, len(completion.token_ids)),)
    return completion.weight_version_spans or whole[: len(completion.token_ids)]


def joined(prefix: Completion | None, rest: Completion) -> Completion:
    """The answer that begins with `prefix` and goes on with `rest`, whose own first token is the one after it."""
    if prefix is None:
        return rest
    start = len(prefix.token_ids)
    spans = list(version_spans(prefix))
    for version, first, end in version_spans(rest):
        if spans and spans[-1][0] == version:
            spans[-1] = (version, spans[-1][1], start + end)
        else:
            spans.append((version, start + first, start + end))
    return Completion(
        np.concatenate([prefix.token_ids, rest.token_ids]),
        np.concatenate([prefix.logprobs, rest.logprobs]),
        rest.finish_reason,
        spans[-1][0] if spans else rest.weight_version,
        tuple(spans) if len(spans) > 1 else (),
    )


def settled(completion: Completion, sampling: SamplingParams) -> Completion:
    """The answer, as one that has ended where a server was told to abort it when its last token was there."""
    ids = completion.token_ids
    if completion.finish_reason != "stopped" or not len(ids):
        return completion
    if int(ids[-1]) in sampling.stop_token_ids:
        return replace(completion, finish_reason="stop")
    return replace(completion, finish_reason="length") if len(ids) >= sampling.max_tokens else completion


def check_version(completion: Completion, asked: int, allow_change: bool, url: str) -> None:
    """WeightVersionError where an answer of the server at `url` is of another version than `asked`.

    allow_change: it may end under a newer version than it began under, if that is not older than `asked`.
    """
    if not len(completion.token_ids):
        return
    spans, last = completion.weight_version_spans, completion.weight_version
    first = spans[0][0] if spans else last
    if not first == last == asked and not (allow_change and asked <= first <= last):
        raise WeightVersionError(f"{url} answered under weight version {last}, asked was {asked}")
