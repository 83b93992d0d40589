"""The algorithm: sample, verify, group, recompute log-probs, train, sync. Read top-down.

Every rank runs this. A rank generates and grades its share of the questions; samples then travel to the data-parallel
replica that trains them. What every rank must agree on is computed by each from the same gathered facts.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import partial

from megatron_nft.console import step_line
from megatron_nft.distributed import largest
from megatron_nft.engines.end_tokens import cut_off_note, token_ids
from megatron_nft.metrics import Metrics
from megatron_nft.policy.policy import StepReport
from megatron_nft.train import record
from megatron_nft.train.checkpoints import RunState
from megatron_nft.train.collect import Ask, Collected, collect, generate, write_step
from megatron_nft.train.correction import corrected, steps_over_limit
from megatron_nft.train.held_out import evaluate_held_out
from megatron_nft.train.lifecycle import Interrupted
from megatron_nft.train.manifest import folder_of
from megatron_nft.train.parts import Parts
from megatron_nft.train.replicas import (
    compute_behaviour_logprobs,
    compute_reference_logprobs,
    gap_of_all_ranks,
    micro_batch_progress,
    pack_for_policy,
    send_to_replicas,
)
from megatron_nft.train.rounds import Rounds
from megatron_nft.train.schedule import optimizer_steps, plan_step
from megatron_nft.train.streaming import Producer, StreamInterrupted
from megatron_nft.train.sync import readmit, release_engine, sync_weights
from megatron_nft.weights.export_hf import save_hf


class TrainingFailure(RuntimeError):
    """Too many optimizer steps in a row had a NaN or Inf."""


def train(parts: Parts, state: RunState) -> RunState:
    """Run until train.num_steps, going on from `state`; returns the last state.

    After a stop signal the last complete step is saved and Interrupted is raised.
    """
    num_steps = parts.config.train.num_steps
    parts.life.phases.step = state.step
    producer = open_producer(parts, state) if parts.config.rollout.mode == "overlapped" else None
    try:
        if parts.recorder.has_unwritten:
            finish_step(parts, state)
        while state.step < num_steps:
            metrics = parts.recorder.start_step()
            with parts.profiler.step(state.step + 1):
                state = train_step(parts, state, metrics, producer)
            parts.engine.note_good_step()
            parts.recorder.end_step(metrics)
            finish_step(parts, state)
            if parts.store.pending_step:
                with parts.life.phases("checkpoint"):
                    parts.store.check()
            if signum := largest(parts.life.stop.signum, parts.layout.world_gloo):
                raise Interrupted(signum)
    except Interrupted as interrupted:
        newer = interrupted.state if isinstance(interrupted, StreamInterrupted) else None
        if producer is not None and newer is None:
            with parts.life.phases("generate"):
                producer.stop()
                newer = producer.hold(state)
        save_and_say(parts, newer or state, interrupted, again=newer is not None)
        raise
    finally:
        if producer is not None:
            producer.close()
    wait_for_checkpoint(parts)
    if parts.config.checkpoint.export_hf:
        export(parts)
    return state


def train_step(parts: Parts, state: RunState, metrics: Metrics, producer: Producer | None = None) -> RunState:
    """One step: returns the state after it. Until the optimizer starts, nothing that is saved has changed.

    producer: that of rollout.mode=overlapped.
    """
    config, layout, policy, phases = parts.config, parts.layout, parts.policy, parts.life.phases
    algorithm = config.algorithm.with_correction_for(config.rollout.mode)
    step = phases.step = state.step + 1
    with phases("generate"):
        found = generate_step(parts, state, metrics, producer)
        release_engine(parts.engine, layout)
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
        over = steps_over_limit(state.steps_over_gap, gap, algorithm, parts.store.saved_step)
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
            skipped = count_skipped(skipped, outcome, config.train.max_skipped_steps, parts.store.saved_step)
        policy.finish_updates()
    version = state.weight_version + 1
    with phases("sync"):
        questions = parts.questions
        receipt = sync_weights(parts.sync, parts.engine, policy, questions.stream, questions.tokenizer, version)
        record.add_sync(metrics, receipt)
    record.add_plan(metrics, layout.rank, found.kept, plan, step)
    after = RunState(
        step=step,
        weight_version=version,
        cursor=found.cursor,
        past=found.past,
        surplus=tuple(s for (draw, _), s in samples.items() if draw in plan.surplus),
        waiting=found.waiting,
        steps_over_gap=over,
    )
    if producer is None:
        return after
    with phases("generate"):  # verdicts are waited for
        return producer.hold(after)


def open_producer(parts: Parts, state: RunState) -> Producer:
    """What generates from `state` on, where answers outlive a step. Collective."""
    questions = parts.questions
    return Producer(
        state,
        engine=parts.engine,
        verifier=parts.verifier,
        tokenizer=questions.tokenizer,
        config=parts.config,
        layout=parts.layout,
        stream=questions.stream,
        algorithm=parts.algorithm,
        end_tokens=questions.end_tokens,
    )


def generate_step(parts: Parts, state: RunState, metrics: Metrics, producer: Producer | None) -> Collected:
    """The answers of the step after `state`, in the mode of the settings. Collective.

    producer: where it goes on while the trainer trains.
    """
    rounds, config, questions = open_rounds(parts, state), parts.config, parts.questions
    if producer is not None:
        return producer.collect(state, metrics, rounds)
    if config.rollout.mode == "streaming":
        with closing(open_producer(parts, state)) as of_this_step:
            return of_this_step.collect(state, metrics, rounds)
    return collect(
        ask_engine(parts, state, metrics, rounds),
        state,
        state.step + 1,
        metrics,
        config=config,
        layout=parts.layout,
        stream=questions.stream,
        choice=questions.choice,
        algorithm=parts.algorithm,
        rounds=rounds,
        end_tokens=questions.end_tokens,
    )


def open_rounds(parts: Parts, state: RunState) -> Rounds:
    """What ranks tell each other while they generate with the weights of `state`."""
    questions = parts.questions

    def bring_weights(urls: list[str]) -> None:
        version, say = state.weight_version, parts.life.console.say
        readmit(urls, parts.sync, parts.policy, questions.stream, questions.tokenizer, version, say)

    return Rounds(parts.life, parts.layout.world_gloo, parts.engine.left_behind, bring_weights)


def ask_engine(parts: Parts, state: RunState, metrics: Metrics, rounds: Rounds) -> Ask:
    """How questions of the step after `state` are answered and graded; what it costs is added to `metrics`."""
    return partial(
        generate,
        metrics=metrics,
        engine=parts.engine,
        verifier=parts.verifier,
        tokenizer=parts.questions.tokenizer,
        config=parts.config,
        life=parts.life,
        rounds=rounds,
        step=state.step + 1,
        weight_version=state.weight_version,
        stop_token_ids=token_ids(parts.questions.end_tokens),
    )


def count_skipped(skipped: int, outcome: StepReport, limit: int, saved_step: int) -> int:
    """How many optimizer steps in a row were skipped, the last one included. TrainingFailure above `limit`."""
    if not outcome.skipped:
        return 0
    if skipped + 1 > limit:
        saved = f"the weights of step {saved_step} are in the newest checkpoint"
        raise TrainingFailure(
            f"{skipped + 1} optimizer steps in a row were skipped ({outcome.reason}); "
            f"{saved if saved_step else 'no checkpoint was saved yet'}. Look at grad_norm and gap/mean in "
            "metrics.jsonl, lower optimizer.lr, or raise train.max_skipped_steps"
        )
    return skipped + 1


def finish_step(parts: Parts, state: RunState) -> None:
    """Checkpoint, held-out questions and record of a complete step, as far as they are due.

    The checkpoint comes first and carries the step's metrics: however the evaluation ends, a run that goes on from
    there asks the questions again and writes the record. Raises Interrupted where a stop signal met the evaluation.
    """
    step, config = state.step, parts.config
    at_end = step in (0, config.train.num_steps)
    if step and (at_end or step % config.checkpoint.every_steps == 0):
        save(parts, state)
    evaluation: dict[str, float] = {}
    if at_end or (config.eval.every_steps and step % config.eval.every_steps == 0):
        evaluation = evaluate_held_out(
            parts.questions.held_out,
            parts.engine,
            parts.questions.tokenizer,
            parts.verifier,
            config,
            parts.layout,
            parts.life,
            token_ids(parts.questions.end_tokens),
            open_rounds(parts, state),
        )
    written = parts.recorder.write(step, evaluation)
    parts.life.console.say(step_line(step, config.train.num_steps, written))
    for share, limit in (
        ("length/truncated", config.rollout.max_response_tokens),
        ("eval/truncated_share", config.eval.max_response_tokens or config.rollout.max_response_tokens),
    ):
        if note := cut_off_note(written.get(share) or 0.0, limit, parts.questions.end_tokens):
            parts.life.console.say(f"{share}: {note}")


def save(parts: Parts, state: RunState, *, again: bool = False) -> None:
    """Save a checkpoint of `state`, unless there is one of its step or one is being written. Collective.

    again: also then, in its place, since answers were generated after it.
    """
    if state.step in (parts.store.saved_step, parts.store.pending_step) and not again:
        return
    wait_for_checkpoint(parts)
    with parts.life.phases("checkpoint"):
        state = replace(state, unwritten=parts.recorder.snapshot(state.step))
        surplus = state.surplus if parts.layout.is_replica_leader else None
        parts.store.save(state, parts.saver.snapshot, surplus)


def wait_for_checkpoint(parts: Parts) -> None:
    """Wait for the save that is under way, if one is. Collective."""
    if parts.store.pending_step:
        with parts.life.phases("checkpoint_wait"):
            parts.store.wait()


def save_and_say(parts: Parts, state: RunState, interrupted: Interrupted, *, again: bool) -> None:
    """Save the last complete step after a stop signal, and say what was saved. Collective. again: see `save`."""
    if not state.step:
        parts.life.console.say(f"{interrupted} before the first step was complete; nothing to save")
        return
    save(parts, state, again=again)
    wait_for_checkpoint(parts)
    folder = folder_of(parts.config.run_dir, state.step)
    parts.life.console.say(f"{interrupted}: step {state.step} is saved in {folder}; run the same command to go on")


def export(parts: Parts) -> None:
    """Write the trained weights as a Hugging Face folder. Collective."""
    folder = parts.config.run_dir / "hf"
    with parts.life.phases("export"):
        save_hf(
            parts.policy.chunks,
            parts.spec,
            parts.layout,
            parts.config.model.path,
            folder,
            replace=True,
            chat_template=parts.config.model.chat_template,
        )
    parts.life.console.say(f"the trained model is in {folder}")
