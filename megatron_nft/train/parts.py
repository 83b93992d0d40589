"""The parts of a run that one rank holds, opened from the settings and closed again.

Nothing here changes from step to step: what does is a `RunState`, a local of the loop.
"""

from __future__ import annotations

import gc
import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from megatron_nft.algorithms import Algorithm, open_algorithm
from megatron_nft.config import Config
from megatron_nft.data.choice import Choice, load_choice
from megatron_nft.data.prompts import PromptStream, load_tokenizer
from megatron_nft.engines.end_tokens import EndToken, describe, find_end_tokens
from megatron_nft.engines.engine import Engine
from megatron_nft.engines.open import create_engine
from megatron_nft.engines.sync import open_weight_sync
from megatron_nft.files import sha256_of_file
from megatron_nft.metrics import JsonlSink, Sink, TensorBoardSink, WandbSink
from megatron_nft.policy import checkpoint as policy_checkpoint
from megatron_nft.policy.family import ModelSpec, read_family
from megatron_nft.policy.parallel import ParallelLayout, new_gloo_group
from megatron_nft.policy.policy import Policy
from megatron_nft.policy.stack import read_stack, untested
from megatron_nft.policy.stack import table as stack_table
from megatron_nft.train.checkpoints import CheckpointStore, RunState, read_surplus
from megatron_nft.train.choosing import read_past
from megatron_nft.train.held_out import HeldOut, load_held_out
from megatron_nft.train.lifecycle import Lifecycle, Phases
from megatron_nft.train.manifest import Manifest
from megatron_nft.train.memory import PhaseMemory, check_memory, keep_room
from megatron_nft.train.profile import Profiler
from megatron_nft.train.recorder import Recorder
from megatron_nft.train.sync import sync_weights
from megatron_nft.train.waiting_file import read_waiting
from megatron_nft.verify import VerifierPool
from megatron_nft.weights.import_hf import load_hf
from megatron_nft.weights.sync import WeightSync


@dataclass(frozen=True)
class Questions:
    """What is asked, and how text becomes tokens."""

    tokenizer: PreTrainedTokenizerBase
    end_tokens: tuple[EndToken, ...]  # what ends an answer
    stream: PromptStream  # training questions in the order in which they are drawn
    held_out: HeldOut
    choice: Choice | None  # of what is asked of what is drawn; None: all


@dataclass(frozen=True)
class Parts:
    """Everything that the training loop works with on this rank."""

    config: Config
    layout: ParallelLayout
    spec: ModelSpec
    life: Lifecycle
    questions: Questions
    policy: Policy
    algorithm: Algorithm
    engine: Engine
    sync: WeightSync
    verifier: VerifierPool
    store: CheckpointStore
    saver: policy_checkpoint.Saver
    recorder: Recorder
    profiler: Profiler


@contextmanager
def open_parts(config: Config, layout: ParallelLayout, life: Lifecycle) -> Iterator[tuple[Parts, RunState]]:
    """Build every part, restore the newest checkpoint if there is one, and bring the engine to its weights. Collective.

    Whatever was opened is closed in the end, also when a later part fails to open.
    """
    say = life.console.say
    profiler = Profiler(config.train, config.run_dir, layout.rank, layout.device)
    life.phases.mark = profiler.mark
    if said := untested(read_stack()):
        say(f"warning: {said}. What was:\n{stack_table()}")
    spec = read_family(config.model.path)
    questions = load_questions(config)
    say(
        f"{questions.stream.num_prompts} training questions ({questions.stream.num_dropped} over "
        f"{config.data.max_prompt_tokens} tokens were dropped), {len(questions.held_out.prompts)} held out"
    )
    memory_notes = check_memory(config, spec, layout.device, stage=layout.pp.rank, world_size=layout.world_size)
    say(describe(questions.end_tokens))
    for note in [spec.padding_note(layout.tp.size), *memory_notes]:
        if note:
            say(note)
    policy = Policy.create(config, spec, layout)
    say(f"optimizer: {policy.optimizer_kind}")
    background = None
    if config.checkpoint.asynchronous:  # ranks of one save meet when the slowest has written
        write_s = config.train.stall_timeout_by_phase.checkpoint or config.train.stall_timeout_s
        background = new_gloo_group(max(write_s, config.train.collective_timeout_s))
    store = CheckpointStore(
        config.run_dir, config.checkpoint.keep, _identity(config, spec, layout), layout.world_gloo, background
    )
    state = restore(config, spec, layout, policy, store, questions.stream, say)
    with Closer(life.phases) as closer:
        closer.add(store)
        sinks = _open_sinks(config, first_step=state.step + 1 if state.step else 0) if layout.rank == 0 else []
        for sink in sinks:
            closer.add(sink)
        verifier = VerifierPool(config.verify)
        closer.add(verifier)
        with keep_room(config, spec, layout.device, stage=layout.pp.rank, world_size=layout.world_size):
            engine = create_engine(config, layout)
        closer.add(engine)
        sync = open_weight_sync(config, spec, layout, engine)
        # Servers of our own are gone by then; others are told to leave the update group.
        closer.add(sync, after=engine)
        memory = PhaseMemory(layout.device)
        recorder = Recorder(sinks, life.phases, memory, layout)
        recorder.restore(state)
        life.phases.on_end = memory.note
        parts = Parts(
            config=config,
            layout=layout,
            spec=spec,
            life=life,
            questions=questions,
            policy=policy,
            algorithm=open_algorithm(config.algorithm, max_response_tokens=config.rollout.max_response_tokens),
            engine=engine,
            sync=sync,
            verifier=verifier,
            store=store,
            saver=policy_checkpoint.Saver(policy, copies=config.checkpoint.asynchronous),
            recorder=recorder,
            profiler=profiler,
        )
        sync_weights(sync, engine, policy, questions.stream, questions.tokenizer, state.weight_version)
        gc.collect()
        gc.freeze()  # libraries, model and questions stay to the end: the collector need not walk them in every step
        yield parts, state


def load_questions(config: Config) -> Questions:
    """Tokenizer, end tokens, training and held-out questions. ValueError for files or prompts that cannot be used."""
    tokenizer = load_tokenizer(config.model.path, config.model.chat_template)
    data, system_prompt = config.data, config.model.system_prompt
    stream = PromptStream(
        data.train,
        tokenizer,
        max_prompt_tokens=data.max_prompt_tokens,
        over_long=data.over_long,
        shuffle=data.shuffle,
        seed=config.seed,
        system_prompt=system_prompt,
    )
    held_out = load_held_out(
        config.eval.data,
        tokenizer,
        max_prompt_tokens=data.max_prompt_tokens,
        over_long=data.over_long,
        seed=config.seed,
        system_prompt=system_prompt,
    )
    end_tokens = find_end_tokens(config.model.path, tokenizer, config.rollout.stop_token_ids)
    choice = None if data.choose is None else load_choice(data.choose, config.seed)
    return Questions(tokenizer, end_tokens, stream, held_out, choice)


def _identity(config: Config, spec: ModelSpec, layout: ParallelLayout) -> dict[str, object]:
    """What a checkpoint must agree with to be of this run, and the layout that wrote it."""
    return {
        "seed": config.seed,
        "model": spec.to_dict(),
        "data": _digest(config.data.train),
        "layout": {axis: getattr(layout, axis).size for axis in ("tp", "cp", "pp", "dp")},
    }


def _digest(paths: list[Path]) -> str:
    """SHA-256 over the digests of the training files: their order and content decide what a cursor means."""
    h = hashlib.sha256()
    for path in paths:
        h.update(bytes.fromhex(sha256_of_file(path)))
    return h.hexdigest()


def restore(
    config: Config,
    spec: ModelSpec,
    layout: ParallelLayout,
    policy: Policy,
    store: CheckpointStore,
    stream: PromptStream,
    say: Callable[[str], None],
) -> RunState:
    """The newest whole checkpoint into `policy`, or the Hugging Face weights at step 0. Collective.

    ValueError where there is a checkpoint and checkpoint.resume is never, or one of another rollout.mode.
    """
    steps = store.steps()
    if steps and config.checkpoint.resume == "never":
        raise ValueError(
            f"{config.run_dir} holds a checkpoint of step {steps[0]}, and checkpoint.resume is never: "
            "choose another run_dir, or set checkpoint.resume=auto to go on from it"
        )

    def load(folder: Path, _: Manifest) -> dict[str, str]:
        digests = policy_checkpoint.load_sharded(policy, folder / "megatron")
        return {f"megatron/{name}": digest for name, digest in digests.items()}

    found = store.restore(load, say)
    if found is None:
        load_hf(policy.chunks, config.model.path, spec, layout)
        policy.reload_master_weights()
        return RunState()
    folder, manifest = found
    surplus, streams = read_surplus(folder), config.rollout.mode != "synchronous"
    waiting = read_waiting(folder, stream.prompt, layout.rank, layout.world_size)
    if surplus if streams else any((folder / "waiting").glob("*")):
        kept, other = ("surplus groups", "synchronous") if streams else ("unfinished answers", "streaming")
        raise ValueError(
            f"{folder} holds {kept} of rollout.mode={other}, which rollout.mode={config.rollout.mode} cannot go on "
            f"with: set rollout.mode={other}, or choose another run_dir"
        )
    past, ahead = ({}, ()) if config.data.choose is None else read_past(folder)
    draws = sorted({s.draw for s in surplus})
    mine = {d for i, d in enumerate(draws) if i % layout.dp.size == layout.dp.rank}
    say(f"going on from {folder} (step {manifest.step}, {len(draws)} surplus groups)")
    return RunState(
        step=manifest.step,
        weight_version=manifest.weight_version,
        cursor=manifest.cursor,
        surplus=tuple(s for s in surplus if s.draw in mine),
        past=past,
        ahead=ahead,
        waiting=tuple(waiting),
        steps_over_gap=manifest.steps_over_gap,
        evaluation_due=manifest.evaluation_due,
        unwritten=manifest.figures,
    )


def _open_sinks(config: Config, first_step: int) -> list[Sink]:
    sinks: list[Sink] = [JsonlSink(config.run_dir / "metrics.jsonl", first_step)]
    if config.metrics.tensorboard:
        sinks.append(TensorBoardSink(config.run_dir / "tensorboard", first_step))
    if config.metrics.wandb_project is not None:
        sinks.append(WandbSink(config.metrics.wandb_project, config.run_dir, config.model_dump(mode="json")))
    return sinks


class Closable(Protocol):
    """A part that gives back what it holds."""

    def close(self) -> None: ...


class Closer:
    """Closes what was added when its block ends: the latest first, and each whatever happens to the others."""

    def __init__(self, phases: Phases) -> None:
        self._phases = phases
        self._parts: list[Closable] = []  # in the order in which they were opened; closed from the end

    def add(self, part: Closable, *, after: Closable | None = None) -> None:
        """Close `part` before all that were added earlier, or right after the part `after`."""
        self._parts.insert(len(self._parts) if after is None else self._parts.index(after), part)

    def __enter__(self) -> Closer:
        return self

    def __exit__(self, *_: object) -> None:
        while self._parts:
            try:
                self._parts.pop().close()
            except Exception as e:
                print(f"megatron-nft: {self._phases}: while closing: {type(e).__name__}: {e}", file=sys.stderr)
