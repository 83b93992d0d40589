"""The metrics of a training step, by name, and how each is made.

Every function adds what one rank knows. What all ranks know alike is added by rank 0 alone. Every step has every
metric: where there was nothing to measure, as in a step that generates nothing, a mean or maximum is null and a sum 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_nft.metrics import Max, Mean, Metrics
from megatron_nft.train.correction import Gap
from megatron_nft.train.reasons import Outcomes
from megatron_nft.train.schedule import GroupFacts, StepPlan
from megatron_nft.types import ReasonKind, RolloutGroup, Verdict

if TYPE_CHECKING:
    from megatron_nft.policy.policy import StepReport
    from megatron_nft.train.buffer import OpenGroup

TRAINER_NAMES = frozenset(
    {
        "generation_batches", "grad_norm", "grad_norm/clipped", "grad_norm/max", "loss/total", "lr", "policy/entropy",
        "skipped_steps", "skipped_steps/share", "step", "tokens/generated", "tokens/trained", "tokens_per_s",
    }
)  # fmt: skip
TRAINER_PREFIXES = (
    "accuracy/", "age/", "answers/", "correct_rate/", "correction/", "entropy/", "eval/", "gap/",
    "groups/", "length/", "memory/", "questions/", "seconds/",
    "sync/", "verdict/",
)  # fmt: skip
"""Names of the trainer's own metrics, which an algorithm's must not be added to."""
HISTOGRAM_BINS = 11  # correct rates 0, 0.1, …, 1 sit in bins of their own


def add_rollouts(
    metrics: Metrics, groups: Sequence[RolloutGroup], verify_wait_s: float, tokens_generated: int | None = None
) -> None:
    """Accuracy, verdicts, lengths, correct-rate histogram, over all answers of this generation batch; over none where
    nothing is generated. tokens_generated: where it is not the answers' own."""
    answers = [r for g in groups for r in g.rollouts]
    n = len(answers)
    lengths = [len(r.response_ids) for r in answers]
    metrics.mean("accuracy/train", sum(r.correct for r in answers), n)
    verdicts = Counter(r.verdict for r in answers)
    verdicts[Verdict.NO_VERDICT] += verdicts[Verdict.TIMEOUT]  # a case of it
    for verdict in Verdict:
        metrics.mean(f"verdict/{verdict.value}", verdicts[verdict], n)
    reasons = Counter(r.reason_kind for r in answers)
    for kind in ReasonKind:
        metrics.sum(f"reason/{kind.value}", reasons[kind])
    metrics.mean("length/mean", sum(lengths), n)
    metrics.max("length/max", max(lengths, default=-math.inf))
    metrics.mean("length/truncated", sum(r.finish_reason == "length" for r in answers), n)
    metrics.mean("answers/ignored", sum(r.ignored for r in answers), n)
    metrics.sum("tokens/generated", sum(lengths) if tokens_generated is None else tokens_generated)
    rates = np.array([g.correct_rate for g in groups])
    bins = np.minimum((rates * HISTOGRAM_BINS).astype(int), HISTOGRAM_BINS - 1)
    metrics.histogram("correct_rate/hist", np.bincount(bins, minlength=HISTOGRAM_BINS).tolist())
    metrics.mean("entropy/sampled", -sum(float(r.rollout_logprobs.sum()) for r in answers), sum(lengths))
    metrics.max("seconds/verify_wait", verify_wait_s)
    metrics.mean("seconds/verify_per_answer", sum(r.verify_s for r in answers), n)


def add_groups(metrics: Metrics, rank: int, facts: Sequence[GroupFacts]) -> None:
    """Groups of a generation batch by what becomes of them; none where nothing is generated."""
    if rank != 0:
        return
    fates = Counter(f.fate for f in facts)
    metrics.sum("generation_batches", bool(facts))
    metrics.sum("groups/generated", len(facts))
    for fate in ("all_correct", "all_wrong", "too_few", "too_old"):
        metrics.sum(f"groups/{fate}", fates[fate])
    metrics.sum("groups/dropped", len(facts) - fates["kept"])
    metrics.sum("groups/fresh", fates["kept"])


def add_choice(metrics: Metrics, rank: int, *, asked: int, skipped: int) -> None:
    """questions/skipped_share: what `data.choose` skipped, as a share of the draws of a generation batch."""
    if rank == 0:
        metrics.mean("questions/skipped_share", skipped, asked + skipped)


def add_stream(metrics: Metrics, groups: Sequence[RolloutGroup], waiting: Sequence[OpenGroup]) -> None:
    """What of the answers that leave the buffer went on after a weight sync, and what stays in it."""
    answers = [r for g in groups for r in g.rollouts]
    metrics.mean("answers/continued", sum(len(r.version_spans) > 1 for r in answers), len(answers))
    metrics.sum("answers/under_way", sum(len(group.begun) for group in waiting))
    metrics.sum("groups/waiting", len(waiting))


def add_put_off(metrics: Metrics, rank: int, *, put_off: bool) -> None:
    """sync/put_off: whether the step's sync was put off for an evaluation beside the training. A step without a wait
    for it has 0 in seconds/evaluate_wait."""
    if rank == 0:
        metrics.sum("sync/put_off", put_off)
        metrics.sum("seconds/evaluate_wait", 0.0)


def add_plan(metrics: Metrics, rank: int, kept: Sequence[GroupFacts], plan: StepPlan, step: int) -> None:
    """What was trained, kept for later and given up."""
    if rank != 0:
        return
    left = {*plan.surplus, *plan.stale}
    trained = [f for f in kept if f.draw not in left]
    metrics.sum("groups/kept", len(trained))
    metrics.sum("groups/surplus", len(plan.surplus))
    metrics.sum("groups/stale_dropped", len(plan.stale))
    metrics.mean("groups/staleness", sum(step - f.step for f in trained), len(trained))
    metrics.sum("tokens/trained", sum(plan.response_tokens))
    for version, tokens in (made for facts in trained for made in facts.made_by):
        age = step - 1 - version  # version 0 generates step 1
        metrics.mean("age/mean", age * tokens, tokens)  # of trained tokens, in weight syncs
        metrics.max("age/max", age)


def add_gap(metrics: Metrics, rank: int, gap: Gap) -> None:
    """The trainer's log-probs against the engine's over the tokens of this step's kept answers, of all ranks.

    gap/mean, gap/max               |log w| in nats per token, w = pi_trainer / pi_engine
    gap/k1, gap/k3                  estimates of KL(engine || trainer): -log w, and w - 1 - log w, never below 0
    correction/effective_share      effective sample size of w as a share of the tokens
    correction/truncated_share      tokens whose weight is a bound
    correction/masked_share         tokens without weight
    correction/vetoed_share         answers without weight because of a single token
    """
    if rank != 0:
        return
    for name, total in (("mean", gap.absolute), ("k1", gap.k1), ("k3", gap.k3)):
        metrics.mean(f"gap/{name}", total, gap.tokens)
    metrics.max("gap/max", gap.largest)
    metrics.mean("correction/effective_share", gap.effective_share, bool(gap.tokens))
    metrics.mean("correction/truncated_share", gap.truncated, gap.tokens)
    metrics.mean("correction/masked_share", gap.masked, gap.tokens)
    metrics.mean("correction/vetoed_share", gap.vetoed, gap.answers)


def add_optimizer_step(metrics: Metrics, rank: int, report: StepReport, clip_grad: float) -> None:
    """One optimizer step, the algorithm's own metrics included; the report holds sums over all ranks already. Of a
    skipped one nothing but that counts. clip_grad: optimizer.clip_grad.

    ValueError, on every rank, where the algorithm gives a metric the name of one of the trainer's.
    """
    if taken := [n for n in report.metrics if n in TRAINER_NAMES or n.startswith(TRAINER_PREFIXES)]:
        raise ValueError(f"the algorithm's metric {taken[0]!r} has a name of the trainer's own; choose another")
    if rank != 0:
        return
    metrics.mean("skipped_steps/share", float(report.skipped), 1)
    metrics.sum("skipped_steps", float(report.skipped))
    metrics.mean("lr", report.lr, 1)
    made: dict[str, Mean | Max] = {
        "loss/total": Mean(report.loss, 1),
        "grad_norm": Mean(report.grad_norm, 1),
        "grad_norm/max": Max(report.grad_norm),
        "grad_norm/clipped": Mean(float(0 < clip_grad < report.grad_norm), 1),  # share of updates
        **report.metrics,
    }
    for name, value in made.items():
        nothing = Mean(0, 0) if isinstance(value, Mean) else Max(-math.inf)
        metrics.add(name, nothing if report.skipped else value)


def add_sync(metrics: Metrics, costs: dict[str, float]) -> None:
    """Seconds and bytes of a weight sync, the slowest rank's."""
    for name, value in costs.items():
        metrics.max(f"sync/{name}", value)


def add_seconds(metrics: Metrics, phases: dict[str, float], total: float) -> None:
    """Seconds per phase, as rank 0 saw them."""
    for name, seconds in phases.items():
        metrics.sum(f"seconds/{name}", seconds)
    if total:
        metrics.sum("seconds/total", total)


def add_memory(metrics: Metrics, phases: dict[str, tuple[int, int]]) -> None:
    """The memory of each phase, of the fullest device: the most that the trainer allocated during the phase, and what
    the device held at its end, the engine's share included."""
    for name, (peak, held) in phases.items():
        metrics.max(f"memory/{name}_peak_bytes", peak)
        metrics.max(f"memory/{name}_device_bytes", held)


def why_empty(
    kept: int, needed: int, batches: int, fates: Counter[str], outcomes: Outcomes, cut_off: str | None = None
) -> str:
    """The message for a step that found too few groups to train. `cut_off` is the note on answers without an end."""
    dropped = ", ".join(f"{n} {fate.replace('_', ' ')}" for fate, n in fates.most_common() if fate != "kept")
    return (
        f"{kept} of {needed} groups were kept after {batches} generation batches (rollout.max_generation_batches), "
        f"{sum(fates.values())} questions in all; dropped: {dropped or 'none'}; {outcomes}. "
        f"{cut_off or _advice(outcomes)}"
    )


def why_stopped(outcomes: Outcomes, bound: float) -> str:
    """The message for a step with too many answers without a verdict. bound: verify.max_failure_share."""
    return (
        f"{outcomes.missing_share:.0%} of the step's answers have no verdict, more than "
        f"verify.max_failure_share={bound:g}: {outcomes}. {_main_advice(outcomes, _FAILURES)}"
    ).rstrip()


_ADVICE = {
    (ReasonKind.GRADER_FAILED,): "Grading failed, which says nothing of the answers: {said}. Mend the grader "
    "(verify.grader)",
    (ReasonKind.TIMEOUT,): "Grading took too long: raise verify.timeout_s or verify.workers",
    (ReasonKind.MEMORY,): "Grading needed too much memory: raise verify.memory_bytes",
    (ReasonKind.REFERENCE,): "The reference answers cannot be used: look at `reason` in the rollout file, and at the "
    "data",
    (ReasonKind.NO_ANSWER,): "The grader found no answer in the texts: ask for the form that it looks for (a box, "
    "usually), or choose another one (verify.grader)",
    (ReasonKind.CUT_OFF, ReasonKind.UNFINISHED): "Most answers were cut off, or end within their thinking or a box: "
    "raise rollout.max_response_tokens, or see rollout.stop_token_ids",
}
"""By what the reasons have in common: an answer that is cut off and one that ends while it thinks have one cause."""
_FAILURES = tuple(_ADVICE)[:3]


def _advice(outcomes: Outcomes) -> str:
    """What to do about groups that cannot be trained: about the reasons, where half of the answers or more have one."""
    if outcomes.share(*(kind for kinds in _ADVICE for kind in kinds)) >= 0.5:
        return _main_advice(outcomes, tuple(_ADVICE))
    return (
        "A group is kept when its answers are neither all right nor all wrong: use questions nearer to what the model "
        "can do, more answers per question (rollout.answers_per_question), fewer groups per step "
        "(train.questions_per_step), or raise the bound"
    )


def _main_advice(outcomes: Outcomes, causes: Sequence[tuple[ReasonKind, ...]]) -> str:
    """The advice on the most frequent cause, and on every other that is at least half as frequent."""
    shares = {kinds: outcomes.share(*kinds) for kinds in causes}
    main = sorted((k for k in causes if 2 * shares[k] >= max(shares.values()) > 0), key=lambda k: -shares[k])
    said = " ".join(next(iter(dict(outcomes.failures.most_common(1))), "").split())
    return ". ".join(_ADVICE[kinds].format(said=said) for kinds in main)
