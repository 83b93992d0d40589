"""The stream of questions, in an order that depends only on the seed and the draw.

With n questions, draw d is question `permutation(seed, d // n)[d % n]`: an epoch is a permutation of its own, and
one integer (the next draw) says where the stream stands. Every rank holds the same stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_nft.data.conflicts import refuse_conflicts
from megatron_nft.data.rows import DataError, QuestionRow, read_rows
from megatron_nft.types import Prompt
from megatron_nft.verify.thinking import opens_thinking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def load_tokenizer(model_path: Path | str, chat_template: Path | str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder, with the Jinja file `chat_template` in place of its own where given.

    DataError when the folder holds no tokenizer or one that needs code of its own, which is never run.
    """
    from transformers import AutoTokenizer

    folder = Path(model_path)
    if not folder.is_dir():
        raise DataError(f"model folder {folder}: not there; model.path must be a folder in Hugging Face format")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise DataError(
            f"model folder {folder}: has no tokenizer (none of {', '.join(TOKENIZER_FILES)}); "
            "copy the tokenizer files of the model into it"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as e:  # transformers raises many kinds here, all of which mean the same to the user
        raise DataError(
            f"model folder {folder}: its tokenizer cannot be loaded without running code from the folder, "
            f"or is damaged ({type(e).__name__}: {e})"
        ) from e
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise DataError(f"chat template {chat_template}: cannot be read ({e})") from None
    return tokenizer


def render(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[dict[str, str]]]) -> list[np.ndarray]:
    """Return the token ids, int32 [P], of each conversation up to where the answer begins."""
    return encode(tokenizer, render_texts(tokenizer, conversations))


def render_texts(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[dict[str, str]]],
    places: Sequence[str] = (),
    settings: str = "model.chat_template or model.system_prompt",
) -> list[str]:
    """Return each conversation as text up to where the answer begins.

    With a chat template that is the template with its generation prompt, without one the contents, joined by line
    feeds. places: file and row of each conversation, for errors. settings: what the user may change. DataError where
    the chat template refuses a conversation.
    """
    texts: dict[tuple[tuple[str, str], ...], str] = {}
    keys = [_key(conversation) for conversation in conversations]
    for number, (key, conversation) in enumerate(zip(keys, conversations), start=1):
        if key not in texts:  # sets of questions often hold copies
            place = places[number - 1] if places else f"conversation {number}"
            texts[key] = _prompt_text(tokenizer, conversation, place, settings)
    return [texts[key] for key in keys]


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[np.ndarray]:
    """Return the token ids, int32 [P], of each text of `render_texts`.

    A chat template has written all special tokens, and nothing is added. Without one, what the tokenizer puts before a
    text is added (usually BOS, and only once). What it puts behind a text (EOS, for some) never ends a prompt: the
    answer goes on there.
    """
    unique = list(dict.fromkeys(texts))
    if tokenizer.chat_template is not None:
        encoded = tokenizer(unique, add_special_tokens=False)["input_ids"]
    else:
        before, behind = _added_tokens(tokenizer)
        full = tokenizer(unique, add_special_tokens=True)["input_ids"] if unique else []
        encoded = [_trimmed(tokens, before, behind) for tokens in full]
    ids = {text: np.asarray(tokens, dtype=np.int32) for text, tokens in zip(unique, encoded)}
    return [ids[text] for text in texts]


def show_prompt(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int] | np.ndarray) -> str:
    """Return a prompt as people check it: how many tokens, the text that they stand for, and each token."""
    ids = [int(i) for i in token_ids]
    tokens = " ".join(f"{i}:{token!r}" for i, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True))
    return f"{len(ids)} tokens:\n{tokenizer.decode(ids)}\nits tokens: {tokens}"


def _key(conversation: Sequence[dict[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple((m["role"], m["content"]) for m in conversation)


def _prompt_text(
    tokenizer: PreTrainedTokenizerBase, conversation: Sequence[dict[str, str]], place: str, settings: str
) -> str:
    if tokenizer.chat_template is None:
        return "\n".join(m["content"] for m in conversation)
    try:
        text = tokenizer.apply_chat_template(list(conversation), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template may raise anything: it is a program
        roles = ", ".join(m["role"] for m in conversation)
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(
            f"{place}: the chat template refuses this prompt (roles: {roles}): {cause}; "
            f"change {settings}, or the prompt"
        ) from None
    return str(text)


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer puts before and behind a text."""
    probe = ["1"]
    [bare] = tokenizer(probe, add_special_tokens=False)["input_ids"]
    [full] = tokenizer(probe, add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def _trimmed(tokens: list[int], before: list[int], behind: list[int]) -> list[int]:
    """Without what was added behind the text, and without a second copy of what was added before it."""
    tokens = tokens[: len(tokens) - len(behind)]
    doubled = before and tokens[len(before) : 2 * len(before)] == before
    return tokens[len(before) :] if doubled else tokens


class PromptStream:
    """Questions without end, in an order given by `seed` (file order without `shuffle`).

    paths        the files it was read from
    cursor       the next draw; set it to go on from there
    num_prompts  questions that are drawn from
    num_dropped  questions left out for being over-long

    DataError for files that cannot be used, for copies of a question with different answers, for conversations that the
    chat template refuses, and for over-long prompts with `over_long="refuse"`.
    """

    def __init__(
        self,
        paths: Sequence[Path | str],
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_tokens: int,
        over_long: str = "drop",
        shuffle: bool = True,
        seed: int = 0,
        system_prompt: str | None = None,
    ) -> None:
        if over_long not in ("drop", "refuse"):
            raise ValueError(f"over_long={over_long!r}: must be drop or refuse")
        self.paths = tuple(Path(p) for p in paths)
        rows = [row for path in self.paths for row in read_rows(path)]
        if not rows:
            raise DataError("no question files given: set data.train")
        refuse_conflicts((_key(row.messages), row.answer, row.where) for row in rows)
        conversations = [_conversation(row, system_prompt) for row in rows]
        texts = render_texts(tokenizer, conversations, [row.where for row in rows])
        self._prompts: list[Prompt] = []
        for index, (row, messages, text, ids) in enumerate(zip(rows, conversations, texts, encode(tokenizer, texts))):
            if len(ids) == 0:
                raise DataError(f"{row.where}, column 'prompt': becomes no tokens at all with this tokenizer")
            if len(ids) <= max_prompt_tokens:
                opens = opens_thinking(text)
                self._prompts.append(Prompt(index, row.data_source, messages, row.answer, ids, row.extra, opens))
            elif over_long == "refuse":
                raise DataError(
                    f"{row.where}, column 'prompt': {len(ids)} tokens, above data.max_prompt_tokens="
                    f"{max_prompt_tokens}; raise it, or set data.over_long=drop"
                )
        self.num_prompts = len(self._prompts)
        self.num_dropped = len(rows) - len(self._prompts)
        if not self._prompts:
            raise DataError(
                f"{', '.join(map(str, paths))}: all {len(rows)} prompts are above data.max_prompt_tokens="
                f"{max_prompt_tokens}; raise it"
            )
        self.cursor = 0
        self._shuffle, self._seed = shuffle, seed

    def draw(self, n: int) -> list[tuple[int, Prompt]]:
        """Return the next `n` questions, each with its draw, and move the cursor past them."""
        draws = range(self.cursor, self.cursor + n)
        self.cursor += n
        return [(d, self.prompt(d)) for d in draws]

    def prompt(self, draw: int) -> Prompt:
        """Return the question of `draw`, whatever the cursor."""
        epoch, position = divmod(draw, self.num_prompts)
        return self._prompts[_order(self._seed, epoch, self.num_prompts)[position] if self._shuffle else position]


def with_system_prompt(messages: tuple[dict[str, str], ...], system_prompt: str | None) -> tuple[dict[str, str], ...]:
    """Put `system_prompt` in front of a conversation, unless it is None or the conversation has one of its own."""
    if system_prompt is None or messages[0]["role"] == "system":
        return messages
    return ({"role": "system", "content": system_prompt}, *messages)


def _conversation(row: QuestionRow, system_prompt: str | None) -> tuple[dict[str, str], ...]:
    if system_prompt is not None and row.messages[0]["role"] == "system":
        raise DataError(
            f"{row.where}, column 'prompt': has a system message of its own while model.system_prompt is set; "
            "leave one of them out"
        )
    return with_system_prompt(row.messages, system_prompt)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)
