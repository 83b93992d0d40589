"""The tokens that end an answer: one rule, whatever engine generates it.

SGLang ends an answer at the tokens of generation_config.json, of config.json and of the tokenizer, and at `<|eom_id|>`
where the tokenizer has it; vLLM at those of generation_config.json (config.json where that is absent) and of the
tokenizer; transformers at those of generation_config.json alone. Here they are all collected, those of
`rollout.stop_token_ids` are added, and every engine is given them (`SamplingParams.stop_token_ids`). The end token
belongs to the answer: it is trained and counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CUT_OFF_SHARE = 0.9
"""Share of answers without an end from which something must be wrong with the end itself."""

MAX_SHOWN = 10  # end tokens in one line

_END_OF_MESSAGE = "<|eom_id|>"  # of Llama 3.1 and later; SGLang always ends there


@dataclass(frozen=True, slots=True)
class EndToken:
    """One token that ends an answer."""

    id: int
    text: str
    sources: tuple[str, ...]  # where it is named

    def __str__(self) -> str:
        return f"{self.text} ({self.id}: {', '.join(self.sources)})"


def find_end_tokens(
    model_path: Path, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int] = ()
) -> tuple[EndToken, ...]:
    """Collect the end tokens of a model folder, by id. stop_token_ids: further ones (rollout.stop_token_ids).

    ValueError where there is none, or where one of `stop_token_ids` is not a token of the model.
    """
    sources: dict[int, list[str]] = {}

    def note(source: str, ids: Iterable[int]) -> None:
        for token_id in ids:
            sources.setdefault(token_id, []).append(source)

    config = _read_json(model_path / "config.json")
    note("tokenizer", _ids(tokenizer.eos_token_id))
    note("generation_config.json", _ids(_read_json(model_path / "generation_config.json").get("eos_token_id")))
    note("config.json", _ids(config.get("eos_token_id")))
    if (end_of_message := tokenizer.get_added_vocab().get(_END_OF_MESSAGE)) is not None:
        note("tokenizer", {end_of_message} - sources.keys())
    size = max(len(tokenizer), config.get("vocab_size") or 0)
    for token_id in stop_token_ids:
        if not 0 <= token_id < size:
            raise ValueError(f"rollout.stop_token_ids: {token_id} is not a token of {model_path}, which has {size}")
    note("rollout.stop_token_ids", dict.fromkeys(stop_token_ids))
    if not sources:
        raise ValueError(
            f"model folder {model_path} names no token that ends an answer (eos_token_id of generation_config.json and "
            "config.json, eos_token of the tokenizer): every answer would be cut off; set rollout.stop_token_ids"
        )
    return tuple(EndToken(i, _text(tokenizer, i), tuple(names)) for i, names in sorted(sources.items()))


def token_ids(end_tokens: Iterable[EndToken]) -> tuple[int, ...]:
    """Return the ids for `SamplingParams.stop_token_ids`."""
    return tuple(token.id for token in end_tokens)


def describe(end_tokens: Iterable[EndToken]) -> str:
    """Return a line for the start of a run."""
    return f"an answer ends at {_listed(end_tokens)}"


def cut_off_note(share: float, max_tokens: int, end_tokens: Iterable[EndToken]) -> str | None:
    """Say that nearly all answers were cut off, and the likely cause; None where `share` (0 to 1) is below 0.9."""
    if not share >= CUT_OFF_SHARE:
        return None
    return (
        f"{share:.0%} of the answers were cut off at {max_tokens} tokens: the model produced none of the tokens that "
        f"end an answer ({_listed(end_tokens)}). Likely causes: it ends its answers with another token "
        "(name it in rollout.stop_token_ids), its chat template is not the one that it was trained with, or it needs "
        "more tokens"
    )


def _listed(end_tokens: Iterable[EndToken]) -> str:
    shown = [str(token) for token in end_tokens]
    more = f" and {len(shown) - MAX_SHOWN} more" if len(shown) > MAX_SHOWN else ""
    return ", ".join(shown[:MAX_SHOWN]) + more


def _ids(value: Any) -> list[int]:
    """eos_token_id as files have it: a number, a list or null. Negative numbers stand for none."""
    values = value if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int) and not isinstance(i, bool) and i >= 0]


def _text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    text = tokenizer.convert_ids_to_tokens(token_id)
    return repr(token_id) if text is None else str(text)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file of the model folder, {} where there is no such file. ValueError where it is damaged."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    return value if isinstance(value, dict) else {}
