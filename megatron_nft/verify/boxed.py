r"""The one parser for `\boxed{}`, `\fbox{}` and `\framebox{}`, for responses and for solutions that hold a reference.

A box is complete when its brace is closed; escaped braces do not count. A box without a brace holds what stands up to
the next space or the end of the formula: TeX would box the 1 of `\boxed 12`, but whoever writes that means 12. Where a
word follows (`the answer in \boxed as asked`) the command is only spoken of. A box that is empty says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

Span = tuple[int, int]  # start and end in the text

MAX_BOXES = 20  # only this many boxes, complete or not, are looked at, from the end
MAX_UNBRACED_CHARS = 200  # a box without a brace is not longer
MAX_BEFORE_CHARS = 60  # so much of the text before a box may take it back
MAX_BETWEEN_CHARS = 300  # boxes further apart are not one sentence

_box = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*(\{?)")
_unbraced_start = re.compile(r"\$?(?P<content>[-+\N{MINUS SIGN}]?\s*(?=[\w\\$({\[\N{SQUARE ROOT}]|\.\d))")
_unbraced_part = re.compile(
    r"\\[A-Za-z]+(?:\s+(?=[\d{\[]))? | \\[%$!,] | \$(?=\d) | (?P<open>[({\[]) | [^\s\\$(){}\[\]]", re.VERBOSE
)
_bracket = re.compile(r"\\.|(?P<open>[({\[])|[]})]")
_blank = re.compile(r"(?:\s|\\[ ,;:!]|~)*")
_brace = re.compile(r"\\[{}\\]|[{}]")
_torn_command = re.compile(r"\\(?:b|bo|box|boxe|boxed|fb|fbo|fbox|framebox)\s*$")
_between_boxes = re.compile(
    r"""[\s$.,;&]* (?:\\[\])])? [\s$.,;&]*
        (?:and|or|\\text\s*\{\s*(?:and|or)\s*\}|\\quad)? [\s$\\(\[]* (?:[a-zA-Z](?:_\{?\d\}?)?\s*=\s*)?""",
    re.VERBOSE,
)
_ends_sentence = re.compile(r"[!?](?!\d)|\.\$*(?=\s|\Z|\\)")
_ends_line = re.compile(r"\n|\\\\")
_written_joint = re.compile(r"(?<![A-Za-z])(?:and|or)(?![A-Za-z])")
_joint = re.compile(r"(?<![A-Za-z])(?:and|or|by|while|whereas)(?![A-Za-z])|[,;&]|\\q?quad", re.IGNORECASE)
_goes_on = re.compile(  # the first box led to the second one, or was corrected by it
    r"""(?<![A-Za-z])
    (?: wait | no | not | actually | correct\w* | instead | rather | but | mistake\w* | errors? | should | becomes? | so
      | thus | hence | therefore | then | gives? | giving | which | because | since | impl\w+ | equal\w* | equivalent\w*
      | that\sis | i\.e | same | simplif\w+ | round\w* | approx\w* | however | again | final\w* | answer | earlier
      | before | previous\w* | chang\w+ | to | from | after | Rightarrow | now | later | yield\w* | mean\w* | oops
      | sorry | hmm | let | substitut\w+ | using | with | when | if | where | for\sa\stotal | total\w* | altogether
      | wrong\w* | incorrect\w* | false | invalid | fail\w* | extraneous | leaving | leaves | reject\w* | discard\w*
      | exclud\w* | ignor\w* | impossible | step | making | make
      | arriv\w+ | reach\w* | obtain\w* | guess\w* | scratch | \w+n['’]t
    ) (?![A-Za-z]) | [→⇒] | [-=]>""",  # noqa: RUF001
    re.VERBOSE | re.IGNORECASE,
)
_taken_back = re.compile(  # ends before a box that is not the answer
    r"""(?<![A-Za-z]) (?: not(?:\s+(?:be|equal\s+to|the|simply))? | \w+n['’]t(?:\s+be)? | oops | instead\s+of
      | rather\s+than | reject\w* | discard\w* | exclud\w* | ignor\w* | without | except(?:\s+for)? | wrongly
    ) (?:\s+(?:the|a|an|value|root|solution|answer|case)){0,2} [\s,$*\\([]*$""",  # noqa: RUF001
    re.VERBOSE | re.IGNORECASE,
)
_name = re.compile(r"=[\s$({\\\[]*$")
_percent_after = re.compile(r"[\s$]*(?:\\?%|percent\b)")


def last_box(text: str) -> str | None:
    """Return the content of the last complete box, with its spaces; None if there is no complete box."""
    spans = next(_boxes(text), None)
    return text[slice(*spans[1])] if spans else None


def last_boxes(text: str) -> str | None:
    r"""Return the last complete box together with those joined to it, without repetitions: `\boxed{1} and \boxed{3}`.

    Boxes of one sentence are joined unless its words say that one leads to the next or corrects it. The contents are
    separated by commas; a percent sign behind the last box is kept.
    """
    contents: list[str] = []
    start = len(text)
    end = 0
    for (box_start, box_end), content in _boxes(text):
        inner = text[slice(*content)].strip()
        if contents and box_end >= start:  # a box around the previous one
            start = box_start
            continue
        if contents and (not _are_joined(text[box_end:start]) or _is_taken_back(text, box_start)):
            break
        if inner not in contents:
            contents.append(inner)
        if not end:
            end = box_end
        start = box_start
    if not contents:
        return None
    answer = ", ".join(reversed(contents))
    return answer + percent_sign(text, end, answer)


def is_cut_off(text: str) -> bool:
    """Whether the text ends within a box: the last one is not closed."""
    match = _last_command(text, len(text))
    if match is not None and (closing_brace(text, match.end()) < 0 if match[1] else match.end() == len(text)):
        return True
    tail = text[-20:]
    return "\\" in tail and bool(_torn_command.search(tail))


def percent_sign(text: str, end: int, answer: str) -> str:
    r"""Return `\%` if a percent sign follows at `end` of `text` and `answer` does not hold one, else ""."""
    return r"\%" if _percent_after.match(text, end) and "%" not in answer else ""


def _are_joined(between: str) -> bool:
    r"""Whether the text between two boxes makes them one answer: ` \text{ and } `, ` cats and `, `, y = `."""
    if len(between) > MAX_BETWEEN_CHARS or _ends_sentence.search(between):
        return False
    ends_line = bool(_ends_line.search(between))
    if _between_boxes.fullmatch(between):  # an `and` may stand in a line of its own
        return not ends_line or bool(_written_joint.search(between))
    if ends_line or _goes_on.search(between):
        return False
    if "=" in between and (not _name.search(between) or between.count("=") > 1):
        return False
    return bool(_joint.search(between))


def _is_taken_back(text: str, start: int) -> bool:
    r"""Whether the words before the box at `start` say that it is not the answer: `not \boxed{3}, \boxed{7}`."""
    return bool(_taken_back.search(text[max(0, start - MAX_BEFORE_CHARS) : start]))


def _last_command(text: str, stop: int) -> re.Match[str] | None:
    """Return the last box command that starts before `stop`; None if there is none."""
    while (at := text.rfind("box", 0, stop)) >= 0:
        start = text.rfind("\\", max(0, at - len("\\frame")), at)
        match = _box.match(text, start) if start >= 0 else None
        if match is not None:
            return match
        stop = at
    return None


def _boxes(text: str) -> Iterator[tuple[Span, Span]]:
    """Yield the spans of the last complete boxes and of their contents, the last one first, without empty ones."""
    before = len(text)
    for _ in range(MAX_BOXES):
        match = _last_command(text, before)
        if match is None:
            return
        before = match.start()
        if match[1]:
            start, end = match.end(), closing_brace(text, match.end())
        else:
            start, end = _without_brace(text, match.end())
        if end >= 0 and not _blank.fullmatch(text, start, end):
            yield (match.start(), end + len(match[1])), (start, end)


def _without_brace(text: str, start: int) -> Span:
    r"""Return the span of what `\boxed 12` or `\boxed\frac12` holds; its end is -1 if the command is only spoken of."""
    first = _unbraced_start.match(text, start)
    if first is None:
        return start, -1
    start, end = first.start("content"), first.end()
    while 0 <= end < start + MAX_UNBRACED_CHARS and (part := _unbraced_part.match(text, end)):
        end = _behind_bracket(text, part.end()) if part["open"] else part.end()
    content = text[start : max(end, start)].rstrip(".,;:?*`\"'")
    is_word = content.isalpha() and len(content) > 1 and not content.isupper()
    return start, -1 if not content or is_word else start + len(content)


def _behind_bracket(text: str, start: int) -> int:
    """Return the index behind the bracket of any kind that closes the one before `start`; -1 if it is missing."""
    depth = 1
    for match in _bracket.finditer(text, start, start + MAX_UNBRACED_CHARS):
        if match[0][0] != "\\":
            depth += 1 if match["open"] else -1
            if depth == 0:
                return match.end()
    return -1


def closing_brace(text: str, start: int) -> int:
    """Return the index of the brace that closes the one before `start`; -1 if it is missing."""
    depth = 1
    for match in _brace.finditer(text, start):
        sign = match[0]
        if sign == "{":
            depth += 1
        elif sign == "}":
            depth -= 1
            if depth == 0:
                return match.start()
    return -1
