"""The end of a step: its checkpoint, held-out questions and record, as far as they are due; and that of a run."""

from __future__ import annotations

from dataclasses import replace

from megatron_nft.engines.end_tokens import token_ids
from megatron_nft.train.checkpoints import RunState
from megatron_nft.train.generation import open_rounds
from megatron_nft.train.held_out import evaluate_held_out
from megatron_nft.train.lifecycle import Interrupted
from megatron_nft.train.manifest import folder_of
from megatron_nft.train.overlap import Overlap
from megatron_nft.train.parts import Parts
from megatron_nft.train.step_record import evaluates_after, write_record
from megatron_nft.weights.export_hf import save_hf


def finish_step(parts: Parts, state: RunState, overlap: Overlap | None) -> None:
    """Checkpoint, held-out questions and record of a complete step, as far as they are due. Collective.

    The checkpoint comes first and carries the step's metrics: however the evaluation ends, a run that goes on from
    there asks the questions again and writes the record. Raises Interrupted where a stop signal met the evaluation.

    overlap: that of rollout.mode=overlapped. There the evaluation begins, and its figures and all records since are
    written when it has ended; only that of the last step is waited for. No checkpoint is saved meanwhile: its weights
    would not be those of the evaluation, which a run that goes on from it could not begin anew.
    """
    step, config = state.step, parts.config
    under_way = overlap is not None and overlap.evaluation is not None
    at_end = step == config.train.num_steps
    if step and not under_way and (at_end or parts.store.is_due(step, config.checkpoint.every_steps)):
        save(parts, state if overlap is None else overlap.hold(state))
    figures: dict[str, float] = {}
    due = evaluates_after(step, config) or state.evaluation_due
    if overlap is not None:
        if (due or overlap.is_owed) and not under_way:
            overlap.begin_evaluation(step)
            if at_end:
                figures = overlap.end_last_evaluation(state.weight_version)
        if overlap.evaluation is not None:
            parts.recorder.hold(step)
            return
    elif due:
        figures = evaluate_held_out(
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
    write_record(parts, step, figures)


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
