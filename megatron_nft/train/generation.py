"""The answers of a step, in the mode of the settings (rollout.mode)."""

from __future__ import annotations

from contextlib import closing
from functools import partial

from megatron_nft.engines.end_tokens import token_ids
from megatron_nft.metrics import Metrics
from megatron_nft.policy.parallel import new_gloo_group
from megatron_nft.train.checkpoints import RunState
from megatron_nft.train.collect import Ask, Collected, collect, generate
from megatron_nft.train.overlap import Overlap
from megatron_nft.train.parts import Parts
from megatron_nft.train.rounds import Rounds
from megatron_nft.train.streaming import Producer
from megatron_nft.train.sync import readmit


def open_overlap(parts: Parts, state: RunState) -> Overlap:
    """What goes on beside the training from `state` on. Collective."""
    group = new_gloo_group(parts.config.train.collective_timeout_s)
    is_owed = state.evaluation_due and parts.recorder.has_unwritten  # else it has ended since the checkpoint
    return Overlap(parts, open_producer(parts, state), group, evaluation_due=is_owed)


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
        choice=questions.choice,
        end_tokens=questions.end_tokens,
    )


def generate_step(parts: Parts, state: RunState, metrics: Metrics, overlap: Overlap | None) -> Collected:
    """The answers of the step after `state`, in the mode of the settings. Collective.

    overlap: where they are made while the trainer trains.
    """
    if overlap is not None:
        return overlap.producer.collect(state, metrics, overlap.open_rounds(state, metrics))
    rounds, config, questions = open_rounds(parts, state), parts.config, parts.questions
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
