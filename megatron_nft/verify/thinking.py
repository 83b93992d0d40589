"""Which part of a response may hold its answer: what stands behind the last `</think>`.

Thinking that was not finished, or with nothing behind it, gives no answer, whatever is boxed in it or before it. A
prompt that ends in `<think>` has opened it. `<thinking>` and `<thought>` mean the same, in letters of any case. The
graders learn of the prompt from their `extra`, under the key `PROMPT_OPENS_THINKING`.
"""

from __future__ import annotations

import re
from typing import Any

from megatron_nft.types import ReasonKind

PROMPT_OPENS_THINKING = "prompt_opens_thinking"
_tag = re.compile(r"<(/?)\s*(?:think(?:ing)?|thoughts?)\s*>", re.IGNORECASE)
MAX_TAG_CHARS = 40


class NoAnswer(ValueError):
    """The response holds no final answer; the message says why, and `kind` in one word."""

    def __init__(self, message: str, kind: ReasonKind = ReasonKind.NO_ANSWER) -> None:
        super().__init__(message)
        self.kind = kind


def opens_thinking(prompt: str) -> bool:
    """Whether a rendered prompt ends in `<think>`, so that the response starts within it."""
    tags = list(_tag.finditer(prompt.rstrip()[-MAX_TAG_CHARS:]))
    return bool(tags) and not tags[-1][1] and tags[-1].end() == len(tags[-1].string)


def is_opened(extra: dict[str, Any] | None) -> bool:
    """Whether a grader's `extra` says that the prompt ends in `<think>`."""
    return extra is not None and extra.get(PROMPT_OPENS_THINKING) is True


def with_opened(extra: dict[str, Any] | None) -> dict[str, Any]:
    """Return `extra` with the note that the prompt ends in `<think>`."""
    return {**(extra or {}), PROMPT_OPENS_THINKING: True}


def answer_part(response: str, *, opened: bool = False) -> str:
    """Return the part of a response in which its answer is looked for.

    opened: the prompt ends in `<think>`. Raises NoAnswer if the thinking is not finished or nothing follows it.
    """
    if not opened and "<" not in response and response and not response.isspace():
        return response
    closed_at, is_reopened = 0, False
    for tag in _tag.finditer(response):
        is_reopened = not tag[1]
        if tag[1]:
            closed_at = tag.end()
    if opened and not closed_at:
        raise NoAnswer(
            "the thinking is not finished: the prompt opens it, and there is no </think>", ReasonKind.UNFINISHED
        )
    if is_reopened:
        raise NoAnswer("the thinking is not finished: there is no </think>", ReasonKind.UNFINISHED)
    rest = response[closed_at:]
    if rest.strip():
        return rest
    raise NoAnswer("nothing follows </think>" if closed_at else "the response is empty")
