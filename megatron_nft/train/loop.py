"""The algorithm: sample, verify, group, recompute log-probs, train, sync. Read top-down.

Every rank runs this. A rank generates and grades its share of the questions; samples then travel to the data-parallel
replica that trains them. What every rank must agree on is computed by each from the same gathered facts.
"""

from __future__ import annotations

import time
from contextlib import suppress

import numpy as np

from megatron_nft.train import record as step_metrics
from megatron_nft.train.checkpoints import RunState
from megatron_nft.train.collect import collect, write_step
from megatron_nft.console import step_line
from megatron_nft.train.held_out import summarize_held_out
from megatron_nft.evaluate.questions import evaluate_questions, merge_counts
from megatron_nft.distributed import gather, largest
from megatron_nft.train.lifecycle import Interrupted
from megatron_nft.metrics import Metrics
from megatron_nft.train.replicas import compute_behaviour_logprobs, pack_samples, send_to_replicas
from megatron_nft.train.schedule import SampleKey, StepPlan, plan_step
from megatron_nft.train.parts import Trainer
from megatron_nft.types import TrainingSample
from megatron_nft.weights.export_hf import save_hf


class TrainingFailure(RuntimeError):
    """Too many optimizer steps in a row had a NaN or Inf."""


def train(t: Trainer) -> None:
    """Run until train.num_steps, going on from t.state. Raises Interrupted after a stop signal, between steps."""
    num_steps = t.config.train.num_steps
    t.phases.step = t.state.step
    if t.metrics is not None:
        finish_step(t)
    while t.state.step < num_steps:
        t.clock = time.perf_counter()
        metrics = Metrics()
        t.state, t.metrics = train_step(t, metrics), metrics
        finish_step(t)
        if signum := largest(t.stop.signum, t.layout.world_gloo):
            raise Interrupted(signum)
    if t.config.checkpoint.export_hf:
        with t.phases("export"):
            save_hf(
                t.policy.chunks,
                t.spec,
                t.layout,
                t.config.model.path,
                t.config.run_dir / "hf",
                replace=True,
                chat_template=t.config.model.chat_template,
            )
        t.console.say(f"the trained model is in {t.config.run_dir / 'hf'}")


def train_step(t: Trainer, metrics: Metrics) -> RunState:
    """One step: returns the state after it. Until the optimizer starts, nothing that is saved has changed."""
    step = t.phases.step = t.state.step + 1
    with t.phases("generate"):
        found = collect(t, step, metrics)
        t.release_engine()
    with t.phases("exchange"):
        plan = plan_step(
            found.kept,
            step=step,
            questions_per_step=t.config.train.questions_per_step,
            questions_per_optimizer_step=t.config.train.questions_per_optimizer_step,
            num_replicas=t.layout.dp_size,
            max_staleness=t.config.rollout.max_staleness,
            hidden_size=t.spec.hidden_size,
            seed=t.seed,
        )
        samples = send_to_replicas(t, found, plan)
    with t.phases("logprobs"):
        fresh = compute_behaviour_logprobs(t, samples)
        measured = fresh or list(samples.values())  # surplus alone: as measured when it was generated
        step_metrics.add_gap(metrics, measured if t.layout.is_replica_leader else [])
    with t.phases("write"):
        write_step(t, step, found, plan, fresh)
    with t.phases("train"):
        optimizer_steps = run_optimizer_steps(t, step, plan, samples, metrics)
    version = t.state.weight_version + 1
    with t.phases("sync"):
        step_metrics.add_sync(metrics, t.sync_weights(version))
    step_metrics.add_plan(metrics, t.layout.rank, found.kept, plan, step)
    return RunState(
        step=step,
        weight_version=version,
        cursor=found.cursor,
        optimizer_steps=t.state.optimizer_steps + optimizer_steps,
        surplus=tuple(s for (draw, _), s in samples.items() if draw in plan.surplus),
    )


def finish_step(t: Trainer) -> None:
    """Checkpoint, held-out questions and record of a complete step, as far as they are due.

    The checkpoint comes first and carries the step's figures: however the evaluation ends, a run that goes on from
    there asks the questions again and writes the record. Raises Interrupted where a stop signal met the evaluation.
    """
    step, config = t.state.step, t.config
    at_end = step in (0, config.train.num_steps)
    if step and (at_end or step % config.checkpoint.every_steps == 0):
        with t.phases("checkpoint"):
            t.save()
    due = at_end or (config.eval.every_steps and step % config.eval.every_steps == 0)
    report(t, evaluate(t) if due else {})


def run_optimizer_steps(
    t: Trainer, step: int, plan: StepPlan, samples: dict[SampleKey, TrainingSample], metrics: Metrics
) -> int:
    """All optimizer steps of this training step, epoch by epoch. Returns how many there were."""
    divisor = t.config.algorithm.loss_divisor
    count = skipped = 0
    total = t.config.train.num_epochs * len(plan.optimizer_steps)
    for epoch in range(t.config.train.num_epochs):
        order = np.random.default_rng([t.seed, step, epoch]).permutation(len(plan.optimizer_steps)) if epoch else None
        for i in range(len(plan.optimizer_steps)) if order is None else order:
            mine = [samples[key] for key, replica in plan.optimizer_steps[i].items() if replica == t.layout.dp_rank]
            denominator = float(plan.response_tokens[i]) if divisor == "tokens" else divisor
            count += 1
            batches = pack_samples(t, mine)
            with t.micro_batches(f"update {count} of {total}", len(batches)):
                outcome = t.policy.train_step(batches, t.loss, denominator, t.config.rollout.temperature)
            step_metrics.add_optimizer_step(metrics, t.layout.rank, outcome)
            skipped = skipped + 1 if outcome.skipped else 0
            if skipped > t.config.train.max_skipped_steps:
                saved = f"the weights of step {t.saved_step} are in the newest checkpoint"
                raise TrainingFailure(
                    f"{skipped} optimizer steps in a row were skipped ({outcome.reason}); "
                    f"{saved if t.saved_step else 'no checkpoint was saved yet'}. Look at grad_norm and gap/mean in "
                    "metrics.jsonl, lower optimizer.lr, or raise train.max_skipped_steps"
                )
    return count


def evaluate(t: Trainer) -> dict[str, float]:
    """Held-out accuracy, each rank asking its share; the same figures on every rank. Interrupted by a stop signal."""
    if not t.held_out.prompts:
        return {}
    settings = t.config.eval
    mine = t.held_out.prompts[t.layout.rank :: t.layout.world_size]
    with t.phases("evaluate"), t.console.bar("held-out questions", len(mine) * settings.samples) as advance:

        def on_answer(_: object) -> None:
            t.stop.check()
            t.phases.progress()
            advance()

        counts = None
        with suppress(Interrupted):  # told to the others below: all ranks leave together
            t.stop.check()
            result = evaluate_questions(
                t.engine,
                mine,
                t.tokenizer,
                t.verifier,
                samples=settings.samples,
                temperature=settings.temperature,
                top_p=settings.top_p,
                max_tokens=settings.max_response_tokens or t.config.rollout.max_response_tokens,
                seed=t.seed,
                on_answer=on_answer,
            )
            counts = result.counts()
        answers = gather((t.stop.signum, counts), t.layout.world_gloo)
        if any(part is None for _, part in answers):
            raise Interrupted(max(signum for signum, _ in answers))
    merged = merge_counts([part for _, part in answers])
    return {f"eval/{name}": value for name, value in summarize_held_out(merged, t.held_out).items()}


def report(t: Trainer, figures: dict[str, float]) -> None:
    """The record of the step to every sink and one line to the console. `figures`: of the evaluation."""
    step = t.state.step
    t.take_stock()
    states = gather(t.metrics.state(), t.layout.world_gloo)
    if t.layout.rank == 0:
        record = {**Metrics.merge(states), **figures}
        if step:
            record["tokens_per_s"] = record.get("tokens/generated", 0.0) / record["seconds/total"]
        for sink in t.sinks:
            sink.write(step, record)
        t.console.say(step_line(step, t.config.train.num_steps, record))
    t.metrics = None
