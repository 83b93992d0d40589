"""Makes the quick start's questions and a tiny Qwen2 model, trained by supervised steps until it is right at times.

    python examples/quickstart/prepare.py OUT [--seed S] [--steps N]

OUT/task/train.jsonl, OUT/task/held_out.jsonl   questions with boxed answers
OUT/model                                        the warmed-up model, a Hugging Face folder

The warm-up is plain supervised training with transformers and torch; NFT starts from its result. It takes a fixed
number of steps: one that stopped at an accuracy would stop at another step where rounding differs. What the model,
sampled at temperature 1, gets right of 1,000 questions that are neither trained later nor held out is printed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_nft.data.synthetic import Worked, problems, sft_batches, write_model, write_task
from megatron_nft.engines.embedded.engine import EmbeddedEngine
from megatron_nft.engines.engine import Request, SamplingParams

NUM_TRAIN, NUM_HELD_OUT, NUM_CHECK = 20_000, 4_000, 1_000
NUM_STEPS = 1_000
BATCH_SIZE, LR, LR_RAMP_STEPS = 64, 3e-3, 50
MAX_RESPONSE_TOKENS = 16


IsRight = Callable[[str, str], bool]
"""Whether a response is right, given the reference answer."""


def boxes_the_answer(response: str, answer: str) -> bool:
    """Whether a response ends in a box that holds the reference answer and nothing else."""
    return response.rpartition("\\boxed{")[2] == answer + "}"


def sampled_accuracy(model, tokenizer, questions: Sequence[Worked], seed: int, is_right: IsRight) -> float:
    """Share of `questions` answered right by one sample each, end token required."""
    engine = EmbeddedEngine(model, batch_tokens=65536, weight_version=0)
    encode = tokenizer([p.question for p in questions])["input_ids"]
    requests = [Request(np.array(ids, dtype=np.int32), 1, (seed, i)) for i, ids in enumerate(encode)]
    right = 0
    for i, _, answer in engine.generate(requests, SamplingParams(MAX_RESPONSE_TOKENS)):
        text = tokenizer.decode(answer.token_ids.tolist(), skip_special_tokens=True)
        right += answer.finish_reason == "stop" and is_right(text, questions[i].answer)
    return right / len(questions)


def warm_up(
    folder: Path,
    train: Sequence[Worked],
    check: Sequence[Worked],
    seed: int,
    steps: int = NUM_STEPS,
    is_right: IsRight = boxes_the_answer,
) -> None:
    """Take supervised steps on worked solutions and print the sampled accuracy on `check`."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01, betas=(0.9, 0.99))
    started = time.perf_counter()
    batches = sft_batches(tokenizer, train, BATCH_SIZE, seed)
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()) as progress:
        for step in progress.track(range(1, steps + 1), description="supervised warm-up"):
            ids, mask = next(batches)
            for group in optimizer.param_groups:
                group["lr"] = LR * min(1.0, step / LR_RAMP_STEPS)
            ids_BL = torch.from_numpy(ids)
            logits_BLV = model(input_ids=ids_BL[:, :-1]).logits
            losses_BL = torch.nn.functional.cross_entropy(logits_BLV.transpose(1, 2), ids_BL[:, 1:], reduction="none")
            mask_BL = torch.from_numpy(mask)[:, 1:]
            loss = (losses_BL * mask_BL).sum() / mask_BL.sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    model.eval().save_pretrained(folder)
    seconds = time.perf_counter() - started
    accuracy = sampled_accuracy(model, tokenizer, check, seed, is_right)
    print(f"warm-up: sampled accuracy {accuracy:.1%} after {steps} supervised steps, {seconds:.0f} s")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the model's initial weights and the warm-up")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="of the supervised warm-up")
    args = parser.parse_args(argv)
    write_task(args.out / "task", NUM_TRAIN, NUM_HELD_OUT)
    used = problems(NUM_TRAIN + NUM_HELD_OUT)
    train = used[NUM_HELD_OUT:]
    known = set(used)
    check = [p for p in problems(NUM_CHECK * 2, seed=1) if p not in known][:NUM_CHECK]
    folder = args.out / "model"
    write_model(folder, seed=args.seed)
    warm_up(folder, train, check, args.seed, args.steps)


if __name__ == "__main__":
    main()
