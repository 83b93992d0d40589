"""Question files: parquet in the verl layout, or JSONL. Every problem names file, row and column.

A row, in either format:

    data_source   str, optional                       which set the question is from; graders may look at it
    prompt        [{"role": str, "content": str}]     or a str, which means one user message; a content in parts
                                                      ([{"type": "text", "text": str}]) is joined
    reward_model  {"ground_truth": str, "style": …}   or, in its place, `answer`: str
    ability       str, optional                       not used here
    extra_info    mapping, optional                   handed to graders

Rows are counted from 1; in JSONL a row is a line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_nft import files

COLUMNS = ("data_source", "prompt", "reward_model", "answer", "ability", "extra_info")
_PANDAS_INDEX = "__index_level_0__"  # written by pandas without being asked; carries nothing


class DataError(ValueError):
    """Question data that cannot be used. The message names file, row and column."""


@dataclass(frozen=True, slots=True)
class QuestionRow:
    """A question as a file has it."""

    data_source: str
    messages: tuple[dict[str, str], ...]
    answer: str
    extra: dict[str, Any]
    where: str  # "train.jsonl, row 3", for errors found later


def read_rows(path: Path) -> list[QuestionRow]:
    """Read all questions of a .parquet or .jsonl file. DataError for anything but the layout above."""
    rows = []
    for number, values in read_raw(path):
        where = f"{path}, row {number}"
        _check_columns(values, where)
        rows.append(_row(values, where))
    return rows


def read_raw(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row number from 1, values by column) of a .parquet or .jsonl file with any columns.

    DataError when it cannot be read or holds no row.
    """
    empty = True
    try:
        for number, values in files.read_rows(Path(path)):
            empty = False
            values.pop(_PANDAS_INDEX, None)
            yield number, values
    except files.RowsError as error:
        raise DataError(str(error)) from None
    if empty:
        raise DataError(f"{path}: holds no questions")


def is_text(value: Any) -> bool:
    """Whether a value of `read_raw` is a text in its file."""
    return isinstance(value, str) and not isinstance(value, files.LongInteger)


def _check_columns(names: Iterable[str], where: str) -> None:
    names = list(names)
    unknown = [n for n in names if n not in COLUMNS]
    missing = [c for c in ("prompt",) if c not in names]
    if "reward_model" not in names and "answer" not in names:
        missing.append("reward_model")
    for column in missing:
        near = difflib.get_close_matches(column, unknown, 1, 0.6)
        hint = f"; {near[0]!r} looks like it" if near else ""
        also = " (or 'answer')" if column == "reward_model" else ""
        raise DataError(
            f"{where}: column {column!r}{also} is missing{hint}; columns found: {', '.join(names) or 'none'}"
        )
    for name in unknown:
        near = difflib.get_close_matches(name, COLUMNS, 1, 0.6)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(
            f"{where}: unknown column {name!r} ({hint}known: {', '.join(COLUMNS)}); put further fields into extra_info"
        )


def _row(values: dict[str, Any], where: str) -> QuestionRow:
    extra = values.get("extra_info") or {}
    if not isinstance(extra, dict):
        raise DataError(f"{where}, column 'extra_info': {shown(extra)}, not a mapping")
    source = values.get("data_source") or ""
    if not is_text(source):
        raise DataError(f"{where}, column 'data_source': {shown(source)}, not text")
    return QuestionRow(source, _messages(values["prompt"], where), _answer(values, where), extra, where)


def _messages(prompt: Any, where: str) -> tuple[dict[str, str], ...]:
    try:
        return read_messages(prompt)
    except ValueError as error:
        raise DataError(f"{where}, column 'prompt': {error}") from None


def read_messages(prompt: Any, *, extra_keys: bool = False) -> tuple[dict[str, str], ...]:
    """Read a prompt of any of the forms above. ValueError, without file and row, for anything else.

    extra_keys: whether messages may have keys beside role and content, as those of published files do.
    """
    if is_text(prompt):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(f"{shown(prompt)}; write a text or a list of {{role, content}}")
    messages = []
    for message in prompt:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ValueError(f"{shown(message)} in the list; each message has role and content")
        if len(message) > 2 and not extra_keys:
            raise ValueError(f"{shown(message)} in the list; each message has just role and content")
        found = {"role": message["role"], "content": _joined(message["content"])}
        for key, value in found.items():
            if not is_text(value) or not value.strip():
                raise ValueError(f"{key} is {shown(value)}; it must be a text that is not empty")
        messages.append(found)
    return tuple(messages)


def _joined(content: Any) -> Any:
    """The text of a content in parts; a content of any other form as it is."""
    if not isinstance(content, list) or not content:
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not is_text(part.get("text")):
            raise ValueError(f"content has the part {shown(part)}; only parts of type 'text' can be used")
    return "".join(part["text"] for part in content)


def _answer(values: dict[str, Any], where: str) -> str:
    if values.get("answer") is not None:
        if values.get("reward_model") is not None:
            raise DataError(f"{where}: has both 'answer' and 'reward_model'; keep one")
        column, answer = "answer", values["answer"]
    elif "answer" in values and values.get("reward_model") is None:
        raise DataError(f"{where}, column 'answer': None (null); there is nothing that a response could match")
    else:
        model = values.get("reward_model")
        if not isinstance(model, dict) or "ground_truth" not in model:
            raise DataError(f"{where}, column 'reward_model': {shown(model)}; write {{'ground_truth': '…'}}")
        column, answer = "reward_model.ground_truth", model["ground_truth"]
    if not is_text(answer):
        raise DataError(f'{where}, column {column!r}: {shown(answer)}, not text; write the answer as text, like "42"')
    if not answer.strip():
        raise DataError(f"{where}, column {column!r}: an empty answer, which no response can match")
    if is_nan_text(answer):
        raise DataError(f"{where}, column {column!r}: {NAN_TEXT}")
    return str(answer)


NAN_TEXT = "the text 'nan', which pandas makes of a missing answer; there is nothing that a response could match"


def is_nan_text(answer: str) -> bool:
    """Whether an answer is what a missing number becomes as text."""
    return answer.strip().lower() == "nan"


def shown(value: Any) -> str:
    """`value` and its type, short enough for one line."""
    long = isinstance(value, files.LongInteger)
    text = str(value) if long else repr(value)
    kind = "int" if long else "float" if isinstance(value, float) else type(value).__name__  # as people know them
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({kind})"
