"""The algorithm: sample, verify, group, recompute log-probs, train, sync. Read top-down.

Every rank runs this. A rank generates and grades its share of the questions; samples then travel to the data-parallel
replica that trains them. What every rank must agree on is computed by each from the same gathered facts.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_nft.distributed import largest
from megatron_nft.metrics import Metrics
from megatron_nft.policy.policy import StepReport
from megatron_nft.train import record
from megatron_nft.train.checkpoints import RunState
from megatron_nft.train.collect import write_step
from megatron_nft.train.correction import corrected, steps_over_limit
from megatron_nft.train.finish import export, finish_step, save_and_say, wait_for_checkpoint
from megatron_nft.train.generation import generate_step, open_overlap
from megatron_nft.train.lifecycle import Interrupted
from megatron_nft.train.overlap import Overlap
from megatron_nft.train.parts import Parts
from megatron_nft.train.replicas import (
    compute_behaviour_logprobs,
    compute_reference_logprobs,
    gap_of_all_ranks,
    micro_batch_progress,
    pack_for_policy,
    send_to_replicas,
)
from megatron_nft.train.schedule import optimizer_steps, plan_step
from megatron_nft.train.streaming import StreamInterrupted
from megatron_nft.train.sync import release_engine, sync_weights


class TrainingFailure(RuntimeError):
    """Too many optimizer steps in a row had a NaN or Inf."""


def train(parts: Parts, state: RunState) -> RunState:
    """Run until train.num_steps, going on from `state`; returns the last state.

    After a stop signal the last complete step is saved and Interrupted is raised.
    """
    num_steps = parts.config.train.num_steps
    parts.life.phases.step = state.step
    overlap = open_overlap(parts, state) if parts.config.rollout.mode == "overlapped" else None
    try:
        if parts.recorder.has_unwritten:
            finish_step(parts, state, overlap)
        while state.step < num_steps:
            metrics = parts.recorder.start_step()
            with parts.profiler.step(state.step + 1):
                state = train_step(parts, state, metrics, overlap)
            parts.engine.note_good_step()
            parts.recorder.end_step(metrics)
            finish_step(parts, state, overlap)
            if parts.store.pending_step:
                with parts.life.phases("checkpoint"):
                    parts.store.check()
            if signum := largest(parts.life.stop.signum, parts.layout.world_gloo):
                raise Interrupted(signum)
    except Interrupted as interrupted:
        newer = interrupted.state if isinstance(interrupted, StreamInterrupted) else None
        if overlap is not None:
            with parts.life.phases("generate"):
                newer = overlap.stop(newer or state)
        save_and_say(parts, newer or state, interrupted, again=newer is not None)
        raise
    finally:
        if overlap is not None:
            overlap.close()
    wait_for_checkpoint(parts)
    if parts.config.checkpoint.export_hf:
        export(parts)
    return state


def train_step(parts: Parts, state: RunState, metrics: Metrics, overlap: Overlap | None = None) -> RunState:
    """One step: returns the state after it. Until the optimizer starts, nothing that is saved has changed.

    overlap: that of rollout.mode=overlapped.
    """
    config, layout, policy, phases = parts.config, parts.layout, parts.policy, parts.life.phases
    algorithm = config.algorithm.with_correction_for(config.rollout.mode)
    step = phases.step = state.step + 1
    with phases("generate"):
        found = generate_step(parts, state, metrics, overlap)
        release_engine(parts.engine, layout)
    if overlap is not None:
        overlap.begin_training(state)
    with phases("exchange"):
        plan = plan_step(
            found.kept,
            step=step,
            questions_per_step=config.train.questions_per_step,
            questions_per_optimizer_step=config.train.questions_per_optimizer_step,
            num_replicas=layout.dp.size,
            max_staleness=config.rollout.max_staleness,
            hidden_size=parts.spec.hidden_size,
            seed=config.seed,
        )
        samples = send_to_replicas(found, plan, layout)
    with phases("logprobs"):
        entropy_due = config.metrics.entropy_every_steps and step % config.metrics.entropy_every_steps == 0
        fresh, entropy = compute_behaviour_logprobs(
            policy, samples, config.rollout.temperature, parts.life, with_entropy=bool(entropy_due)
        )
        trained = [s for s in samples.values() if s.draw not in plan.surplus]
        compute_reference_logprobs(policy, trained, config.rollout.temperature, parts.life)
        if layout.is_replica_leader:
            metrics.add("policy/entropy", entropy)
        measured = fresh or list(samples.values())  # surplus alone: as measured when it was generated
        gap = gap_of_all_ranks(measured, algorithm, layout)
        record.add_gap(metrics, layout.rank, gap)
        over = steps_over_limit(state.steps_over_gap, gap, algorithm, parts.store.newest)
    with phases("write"):
        write_step(config.run_dir, step, found, plan, fresh, layout)
    with phases("train"):
        total, skipped = config.train.num_epochs * len(plan.optimizer_steps), 0
        updates = optimizer_steps(plan, samples, config.train.num_epochs, layout.dp.rank, seed=(config.seed, step))
        for number, (mine, tokens, answers) in enumerate(updates, start=1):
            denominator = algorithm.denominator(tokens=tokens, answers=answers)
            batches = pack_for_policy(corrected(mine, algorithm), policy)
            with micro_batch_progress(policy, parts.life, f"update {number} of {total}", len(batches)):
                outcome = policy.train_step(batches, parts.algorithm, denominator, config.rollout.temperature)
            record.add_optimizer_step(metrics, layout.rank, outcome, config.optimizer.clip_grad)
            skipped = count_skipped(skipped, outcome, config.train.max_skipped_steps, parts.store.newest)
        policy.finish_updates()
    version, is_synced = state.weight_version + 1, True
    if overlap is not None:
        overlap.end_training()
        is_synced = overlap.lets_sync(step, version)
    if is_synced:
        with phases("sync"):
            questions = parts.questions
            costs = sync_weights(parts.sync, parts.engine, policy, questions.stream, questions.tokenizer, version)
            record.add_sync(metrics, costs)
    record.add_plan(metrics, layout.rank, found.kept, plan, step)
    after = RunState(
        step=step,
        weight_version=version,
        cursor=found.cursor,
        past=found.past,
        ahead=found.ahead,
        surplus=tuple(s for (draw, _), s in samples.items() if draw in plan.surplus),
        waiting=found.waiting,
        steps_over_gap=over,
    )
    if overlap is None:
        return after
    record.add_put_off(metrics, layout.rank, put_off=not is_synced)
    with phases("generate"):  # verdicts are waited for
        return overlap.producer.hold(after)


def count_skipped(skipped: int, outcome: StepReport, limit: int, newest: Callable[[], int]) -> int:
    """How many optimizer steps in a row were skipped, the last one included. TrainingFailure above `limit`.

    newest: the step of the newest checkpoint, 0 without one; asked for a failure.
    """
    if not outcome.skipped:
        return 0
    if skipped + 1 > limit:
        saved_step = newest()
        saved = f"the weights of step {saved_step} are in the newest checkpoint"
        raise TrainingFailure(
            f"{skipped + 1} optimizer steps in a row were skipped ({outcome.reason}); "
            f"{saved if saved_step else 'no checkpoint was saved yet'}. Look at grad_norm and gap/mean in "
            "metrics.jsonl, lower optimizer.lr, or raise train.max_skipped_steps"
        )
    return skipped + 1
