"""Makes the quick start's questions and a tiny Qwen2 model, trained by supervised steps until it is right at times.

    python examples/quickstart/prepare.py OUT [--seed S] [--target 0.35]

OUT/task/train.jsonl, OUT/task/held_out.jsonl   questions with boxed answers
OUT/model                                        the warmed-up model, a Hugging Face folder

The warm-up is plain supervised training with transformers and torch; NFT starts from its result. It stops when the
model, sampled at temperature 1, gives the right answer to `--target` of 300 questions that are neither trained later
nor held out: models of other seeds learn the task at very different steps. Where rounding differs, another step may be
the first at the target, so run.sh has the arithmetic libraries round alike on every processor.
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

NUM_TRAIN, NUM_HELD_OUT, NUM_CHECK = 20_000, 4_000, 300
BATCH_SIZE, LR, LR_RAMP_STEPS = 64, 3e-3, 50
CHECK_EVERY, TARGET, MAX_STEPS = 20, 0.35, 6_000
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
    model.train().requires_grad_(True)
    return right / len(questions)


def warm_up(
    folder: Path,
    train: Sequence[Worked],
    check: Sequence[Worked],
    seed: int,
    target: float = TARGET,
    is_right: IsRight = boxes_the_answer,
) -> None:
    """Supervised steps on worked solutions until the sampled accuracy on `check` reaches `target`."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01, betas=(0.9, 0.99))
    started, accuracy = time.perf_counter(), 0.0
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("supervised warm-up", total=target, note="")
        for step, (ids, mask) in enumerate(sft_batches(tokenizer, train, BATCH_SIZE, seed), start=1):
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
            if step % CHECK_EVERY == 0:
                accuracy = sampled_accuracy(model, tokenizer, check, seed, is_right)
                note = f"step {step}, sampled accuracy {accuracy:.1%}"
                progress.update(bar, completed=min(accuracy, target), note=note)
                if accuracy >= target:
                    break
            if step >= MAX_STEPS:
                raise SystemExit(f"warm-up: accuracy {accuracy:.1%} after {step} steps, below the target {target:.0%}")
    model.eval().save_pretrained(folder)
    seconds = time.perf_counter() - started
    print(f"warm-up: sampled accuracy {accuracy:.1%} after {step} supervised steps, {seconds:.0f} s")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the model's initial weights and the warm-up")
    parser.add_argument("--target", type=float, default=TARGET, help="sampled accuracy at which the warm-up stops")
    args = parser.parse_args(argv)
    write_task(args.out / "task", NUM_TRAIN, NUM_HELD_OUT)
    used = problems(NUM_TRAIN + NUM_HELD_OUT)
    train = used[NUM_HELD_OUT:]
    known = set(used)
    check = [p for p in problems(NUM_CHECK * 2, seed=1) if p not in known][:NUM_CHECK]
    folder = args.out / "model"
    write_model(folder, seed=args.seed)
    warm_up(folder, train, check, args.seed, args.target)


if __name__ == "__main__":
    main()
