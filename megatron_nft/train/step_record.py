"""The record of a step: written to the sinks, and said in a line."""

from __future__ import annotations

from megatron_nft.config import Config
from megatron_nft.console import step_line
from megatron_nft.engines.end_tokens import cut_off_note
from megatron_nft.train.parts import Parts


def evaluates_after(step: int, config: Config) -> bool:
    """Whether the held-out questions are asked with the weights of `step`."""
    every = config.eval.every_steps
    return step in (0, config.train.num_steps) or bool(every and step % every == 0)


def write_record(parts: Parts, step: int, evaluation: dict[str, float]) -> None:
    """Write the record of `step` with the figures of its evaluation, and say what matters. Collective."""
    config = parts.config
    written = parts.recorder.write(step, evaluation)
    parts.life.console.say(step_line(step, config.train.num_steps, written))
    for share, limit in (
        ("length/truncated", config.rollout.max_response_tokens),
        ("eval/truncated_share", config.eval.max_response_tokens or config.rollout.max_response_tokens),
    ):
        if note := cut_off_note(written.get(share) or 0.0, limit, parts.questions.end_tokens):
            parts.life.console.say(f"{share}: {note}")
