r"""The arithmetic task `steps3` and a tiny model to learn it: the quick start, and tests that need a rising curve.

    question  12+34-56=
    answer    46-56=\boxed{-10}

Operands run from 10 to 99. Text is tokenised byte by byte, with `\boxed{` as one token. The questions are written as
ordinary files and graded by the ordinary graders.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
BOXED = r"\boxed{"
VOCAB_MULTIPLE = 8  # rows of the embedding are padded to this, so that TP 2, 4 and 8 divide them
MAX_RESPONSE_TOKENS = 16  # the longest solution, 198-10=\boxed{188} and the end token, has 13
_DATA_SOURCE = "steps3"


class Worked(Protocol):
    """A question with its reference answer and a worked solution, without the end token."""

    @property
    def question(self) -> str: ...

    @property
    def answer(self) -> str: ...

    @property
    def solution(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Problem:
    """x + y - z."""

    x: int
    y: int
    z: int

    @property
    def question(self) -> str:
        """The prompt."""
        return f"{self.x}+{self.y}-{self.z}="

    @property
    def answer(self) -> str:
        """The reference answer."""
        return str(self.x + self.y - self.z)

    @property
    def solution(self) -> str:
        """The response that the supervised warm-up learns, without the end token."""
        return f"{self.x + self.y}-{self.z}={BOXED}{self.answer}}}"


def problems(num: int, seed: int = 0) -> list[Problem]:
    """Draw `num` different problems, in random order. ValueError above the 90^3 that there are."""
    if not 0 < num <= 90**3:
        raise ValueError(f"{num} problems: there are 1 to {90**3} different ones")
    codes = random.Random(seed).sample(range(90**3), num)
    return [Problem(10 + c // 8100, 10 + c // 90 % 90, 10 + c % 90) for c in codes]


def write_task(folder: Path, num_train: int = 20000, num_held_out: int = 500, seed: int = 0) -> tuple[Path, Path]:
    """Write folder/train.jsonl and folder/held_out.jsonl, which share no question, and return their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = problems(num_train + num_held_out, seed)
    parts = {"held_out": drawn[:num_held_out], "train": drawn[num_held_out:]}
    for name, part in parts.items():
        lines = [
            json.dumps({"data_source": _DATA_SOURCE, "prompt": p.question, "answer": p.answer}) + "\n" for p in part
        ]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder / "train.jsonl", folder / "held_out.jsonl"


def make_tokenizer() -> PreTrainedTokenizerBase:
    r"""Make a tokenizer with a token for each byte and one for `\boxed{`. It puts BOS before a text and adds no EOS.

    Byte-level BPE without merges, because transformers rebuilds the tokenizer of any Qwen2 model as that, whatever
    tokenizer.json says (a WordLevel model loses its tokens in silence).
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate([PAD, BOS, EOS, BOXED, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    core = Tokenizer(models.BPE(vocab, merges=[]))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocab[BOS])])
    core.add_special_tokens([PAD, BOS, EOS])
    core.add_tokens([AddedToken(BOXED, normalized=False)])
    fast: Any = PreTrainedTokenizerFast  # its constructor has no types
    tokenizer: PreTrainedTokenizerBase = fast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=PAD,  # never produced; left out, Qwen2's default would become one more token
        clean_up_tokenization_spaces=False,
    )
    return tokenizer


def write_model(
    folder: Path,
    *,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int = 192,
    tied: bool = True,
) -> Path:
    """Write a Qwen2 model with random weights and the task's tokenizer as a Hugging Face folder (fp32, safetensors)."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = make_tokenizer()
    config = Qwen2Config(
        vocab_size=-(-len(tokenizer) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def sft_samples(tokenizer: PreTrainedTokenizerBase, drawn: Sequence[Worked]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (prompt ids int32 [P], solution ids int32 [R] with EOS) of each; prompts as `PromptStream` does."""
    prompts = tokenizer([p.question for p in drawn])["input_ids"]
    solutions = tokenizer([p.solution for p in drawn], add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    return [
        (np.asarray(prompt, np.int32), np.asarray([*solution, end], np.int32))
        for prompt, solution in zip(prompts, solutions)
    ]


def sft_batches(
    tokenizer: PreTrainedTokenizerBase, drawn: Sequence[Worked], batch_size: int, seed: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield batches for a supervised warm-up, without end: (token ids int64 [B, L], mask float32 [B, L]), padded right.

    The mask is 1 on the solution's tokens and its EOS, which are what the warm-up learns.
    """
    rng = random.Random(seed)
    samples = sft_samples(tokenizer, drawn)
    while True:
        batch = rng.sample(samples, min(batch_size, len(samples)))
        longest = max(len(prompt) + len(solution) for prompt, solution in batch)
        ids = np.full((len(batch), longest), tokenizer.pad_token_id, np.int64)
        mask = np.zeros((len(batch), longest), np.float32)
        for row, (prompt, solution) in enumerate(batch):
            end = len(prompt) + len(solution)
            ids[row, :end] = np.concatenate([prompt, solution])
            mask[row, len(prompt) : end] = 1.0
        yield ids, mask
