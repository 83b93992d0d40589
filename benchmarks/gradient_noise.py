"""What negatives and weights do to the gradient: its noise and its direction, for every loss on the same answers.

    python benchmarks/gradient_noise.py MODEL … [--questions 1000] [--seed 0]

Each MODEL is a policy of the quick start, a Hugging Face folder: the start (runs/…/start/model) and one that was
trained from it (runs/…/hf). Each answers questions of the quick start's task, 16 answers each, until so many have right
and wrong answers; they are graded and trained strictly on-policy (every ratio is 1) by every loss, and the gradient g
of each question is taken with transformers and autograd. Reported per loss:

    noise scale   tr Cov(g) / |E g|^2, in questions (McCandlish et al. 2018, arXiv 1812.06162): batches below it are
                  mostly noise. Unbiased estimates of both; 95 % interval by the jackknife over batches, of the log
    cosine        of the gradient of a batch of 16 questions with the mean of all others
    direction     cosine of E g with that of Dr. GRPO, which is the gradient of the mean reward of those questions,
                  from separate halves of the questions and corrected for their noise

Writes benchmarks/results/gradient_noise.md.
"""

from __future__ import annotations

import argparse
import datetime
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from arms import GRID, ROOT, cpu_model
from transformers import AutoModelForCausalLM

from megatron_nft.algorithms import Algorithm, open_algorithm
from megatron_nft.config import Config
from megatron_nft.config.load import load_config
from megatron_nft.data.grouping import classify
from megatron_nft.data.packing import pack
from megatron_nft.data.prompts import load_tokenizer
from megatron_nft.data.synthetic import problems
from megatron_nft.engines.embedded.engine import EmbeddedEngine
from megatron_nft.engines.engine import Request, SamplingParams
from megatron_nft.evaluate.intervals import t_quantile
from megatron_nft.types import Prompt, Rollout, RolloutGroup, Verdict

RESULTS = ROOT / "benchmarks" / "results" / "gradient_noise.md"
BATCH = 16  # questions of an optimizer step of the quick start
ANSWERS = 16
CHUNK = 64  # questions asked at a time
QUESTION_SEED = 2  # of questions that the quick start neither trains nor holds out, but by chance


@dataclass(frozen=True, slots=True)
class Gradients:
    """Of one loss: the sums over the questions of each batch."""

    batches: np.ndarray  # float64 [B, W], gradients of batches of BATCH questions over the W weights
    squares: np.ndarray  # float64 [B], sum of the questions' squared norms


def answered_groups(model: torch.nn.Module, folder: Path, num: int, seed: int) -> list[RolloutGroup]:
    """`num` questions of the task with graded answers of which some are right and some wrong."""
    tokenizer = load_tokenizer(folder)
    engine = EmbeddedEngine(model, batch_tokens=65536, weight_version=0)
    found: list[RolloutGroup] = []
    questions = problems(40 * num, seed=QUESTION_SEED)
    for begin in range(0, len(questions), CHUNK):
        chunk = questions[begin : begin + CHUNK]
        ids = tokenizer([p.question for p in chunk])["input_ids"]
        requests = [Request(np.array(i, dtype=np.int32), ANSWERS, (seed, begin + n)) for n, i in enumerate(ids)]
        rollouts: dict[int, list[Rollout]] = {n: [] for n in range(len(chunk))}
        for n, sample, a in engine.generate(requests, SamplingParams(16)):
            text = str(tokenizer.decode(a.token_ids.tolist(), skip_special_tokens=True))
            right = a.finish_reason == "stop" and text.rpartition("\\boxed{")[2] == chunk[n].answer + "}"
            verdict = Verdict.CORRECT if right else Verdict.WRONG
            rollouts[n].append(
                Rollout(begin + n, sample, a.token_ids, a.logprobs, a.finish_reason, 0, text, verdict=verdict)
            )
        for n, answers in rollouts.items():
            answers.sort(key=lambda r: r.sample_index)
            prompt = Prompt(begin + n, "steps3", (), chunk[n].answer, requests[n].prompt_ids)
            group = RolloutGroup(begin + n, prompt, answers, 0)
            if classify(group) == "kept":
                found.append(group)
        if len(found) >= num:
            return found[:num]
    raise SystemExit(f"{folder}: only {len(found)} of {len(questions)} questions have right and wrong answers")


def packed_logprobs(model: torch.nn.Module, tokens: list[np.ndarray]) -> torch.Tensor:
    """Log-prob of each next token, fp32 [T] in the order of packing; 0 where a segment ends."""
    longest = max(map(len, tokens))
    ids_NL = torch.zeros(len(tokens), longest, dtype=torch.int64)
    for row, ids in zip(ids_NL, tokens, strict=True):
        row[: len(ids)] = torch.from_numpy(ids.astype(np.int64))
    logits_NLV = model(input_ids=ids_NL, use_cache=False).logits[:, :-1]
    logprobs_NL = logits_NLV.float().log_softmax(-1).gather(-1, ids_NL[:, 1:, None])[..., 0]
    zero = logprobs_NL.new_zeros(1)
    return torch.cat([part for row, ids in zip(logprobs_NL, tokens) for part in (row[: len(ids) - 1], zero)])


def question_gradients(
    model: torch.nn.Module, group: RolloutGroup, arms: dict[str, tuple[Algorithm, Config]]
) -> dict[str, torch.Tensor]:
    """The gradient of each loss over one question's answers, fp32 [W]; divided by answers or by the fixed divisor."""
    weights = [p for p in model.parameters() if p.requires_grad]
    tokens = [np.concatenate([group.prompt.token_ids, r.response_ids]) for r in group.rollouts]
    logprobs_T = packed_logprobs(model, tokens)
    values, offset = logprobs_T.detach().numpy(), 0
    for rollout, ids in zip(group.rollouts, tokens, strict=True):  # strictly on-policy
        first = offset + len(group.prompt.token_ids) - 1
        rollout.trainer_logprobs = values[first : first + len(rollout.response_ids)]
        offset += len(ids)
    found = {}
    for name, (algorithm, config) in arms.items():
        samples = algorithm.samples(group)
        if len(samples) == len(tokens):
            mine_T = logprobs_T
        else:  # only some answers are trained
            kept = np.concatenate([np.full(len(ids), i) for i, ids in enumerate(tokens)])
            chosen = torch.from_numpy(np.isin(kept, [s.sample_index for s in samples]))
            mine_T = logprobs_T[chosen]
        batch = pack(samples, range(len(samples)))
        loss_T = algorithm.loss(mine_T, batch).where(batch.loss_mask > 0, 0.0)
        response_tokens = int(batch.loss_mask.sum())
        total = loss_T.sum() / config.algorithm.denominator(tokens=response_tokens, answers=len(samples))
        grads = torch.autograd.grad(total, weights, retain_graph=True)
        found[name] = torch.cat([g.flatten() for g in grads])
    return found


def all_gradients(
    model: torch.nn.Module, groups: list[RolloutGroup], arms: dict[str, tuple[Algorithm, Config]]
) -> dict[str, Gradients]:
    """Gradients of every loss, summed by batches."""
    num = len(groups) // BATCH
    width = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = {name: Gradients(np.zeros((num, width)), np.zeros(num)) for name in arms}
    for i, group in enumerate(groups[: num * BATCH]):
        for name, gradient in question_gradients(model, group, arms).items():
            found[name].batches[i // BATCH] += gradient.numpy()
            found[name].squares[i // BATCH] += float(gradient.double().square().sum())
    return found


def noise_scale(total: np.ndarray, squares: float, num: int) -> float:
    """tr Cov(g) / |E g|^2 from the sum of `num` gradients and of their squared norms, both estimated without bias."""
    mean_square = squares / num
    square_of_mean = (float(total @ total) - squares) / (num * (num - 1))
    return (mean_square - square_of_mean) / square_of_mean


def with_interval(g: Gradients) -> tuple[float, float, float]:
    """The noise scale in questions with its 95 % interval: the jackknife over batches, of the logarithm."""
    total, squares, n = g.batches.sum(0), float(g.squares.sum()), len(g.batches)
    value = noise_scale(total, squares, n * BATCH)
    without = np.array([noise_scale(total - b, squares - s, (n - 1) * BATCH) for b, s in zip(g.batches, g.squares)])
    logs = np.log(without)
    half = t_quantile(n - 1) * float(np.sqrt((n - 1) / n * np.square(logs - logs.mean()).sum()))
    return value, value * np.exp(-half), value * np.exp(half)


def batch_cosine(g: Gradients) -> float:
    """Mean cosine of a batch's gradient with the sum of all other batches'."""
    total = g.batches.sum(0)
    return float(np.mean([cosine(b, total - b) for b in g.batches]))


def direction(g: Gradients, other: Gradients) -> float:
    """Cosine of the expected gradients of two losses on the same questions, corrected for noise.

    Each half's mean of one is set against the other half's of the other, so that noise in common does not count, and
    divided by the cosines of the halves with themselves, which noise lowers as much.
    """
    (a, b), (c, d) = ((x.batches[0::2].sum(0), x.batches[1::2].sum(0)) for x in (g, other))
    across = (cosine(a, d) + cosine(b, c)) / 2
    return across / float(np.sqrt(cosine(a, b) * cosine(c, d)))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def table(folder: Path, num: int, seed: int) -> str:
    """Markdown of one policy."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    groups = answered_groups(model, folder, num, seed)
    model.requires_grad_(True)
    arms = {}
    for name, (config_name, settings) in GRID.items():
        config = load_config([ROOT / "configs" / f"{config_name}.yaml"], settings)
        limit = config.rollout.max_response_tokens
        arms[name] = (open_algorithm(config.algorithm, max_response_tokens=limit), config)
    found = all_gradients(model, groups, arms)
    rate = np.mean([g.correct_rate for g in groups])
    lines = [f"{len(groups)} questions with right and wrong answers, of which {rate:.1%} are right:", ""]
    lines += ["| loss | noise scale, questions (95 %) | cosine of 16 questions | direction |", "|---|---|---|---|"]
    for name, g in found.items():
        value, low, high = with_interval(g)
        lines += [
            f"| {name} | {value:.0f} ({low:.0f} to {high:.0f}) | {batch_cosine(g):.3f} | "
            f"{direction(g, found['Dr. GRPO']):.3f} |"
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the answers")
    args = parser.parse_args()
    text = "# Noise and direction of the gradient, by loss\n\n"
    text += f"{datetime.date.today()}, {cpu_model()}, `python benchmarks/gradient_noise.py`.\n"
    for folder in args.models:
        title = "Trained policy" if folder.name == "hf" else "Start"
        text += f"\n## {title}\n\n{table(folder, args.questions, args.seed)}\n"
    RESULTS.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
