"""Everything that a rank of a run holds, opened from the settings and closed again."""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_nft.train import record as step_metrics
from megatron_nft.train.checkpoints import CheckpointStore, RunState, folder_of, read_surplus
from megatron_nft.config import Config, dump_config
from megatron_nft.console import Console
from megatron_nft.data.packing import filler, pack
from megatron_nft.data.prompts import PromptStream, load_tokenizer
from megatron_nft.train.memory import PhaseMemory, check_memory, release_unused
from megatron_nft.train.held_out import HeldOut, load_held_out
from megatron_nft.distributed import gather, largest
from megatron_nft.train.lifecycle import Phases, StopSignals
from megatron_nft.losses import make_loss
from megatron_nft.metrics import JsonlSink, Metrics, Sink, TensorBoardSink, WandbSink
from megatron_nft.policy import checkpoint as policy_checkpoint
from megatron_nft.policy.family import ModelSpec, read_family
from megatron_nft.policy.parallel import ParallelLayout
from megatron_nft.policy.policy import Policy
from megatron_nft.engines.open import create_engine
from megatron_nft.engines.sleep import SleepingServers
from megatron_nft.types import TrainingSample
from megatron_nft.verify import VerifierPool
from megatron_nft.weights.import_hf import load_hf
from megatron_nft.weights.sync import WeightSync


@dataclass
class Trainer:
    """One rank's parts. The loop (loop.py) is written in terms of these."""

    config: Config
    layout: ParallelLayout
    phases: Phases
    stop: StopSignals
    console: Console
    spec: ModelSpec
    policy: Policy
    tokenizer: Any
    prompts: PromptStream
    held_out: HeldOut
    engine: Any  # rollout.engine.Engine
    sync: WeightSync
    verifier: VerifierPool
    loss: Callable
    store: CheckpointStore
    sinks: list[Sink]
    memory: PhaseMemory
    sleeping: SleepingServers | None  # the servers that this rank started, where they share its GPU
    state: RunState
    saved_step: int  # of the newest checkpoint; 0 without one
    metrics: Metrics | None  # of state.step, until its record is written
    clock: float = field(default_factory=time.perf_counter)  # when figures took the seconds last
    engine_released: bool = False

    @property
    def seed(self) -> int:
        return self.config.seed

    def sync_weights(self, version: int) -> dict[str, float]:
        """The policy's weights into the engine as `version`, checked; seconds and bytes for the metrics."""
        probe = self._probe()
        self.resume_engine()
        return self.sync.sync(self.policy.chunks, version, probe=probe).metrics()

    @contextmanager
    def micro_batches(self, description: str, total: int) -> Iterator[None]:
        """Around a pass of the policy over `total` micro-batches: a bar, and each of them is progress for the watch."""
        with self.console.bar(f"step {self.phases.step}: {description}", total) as advance:
            self.policy.on_micro_batch = lambda: (self.phases.progress(), advance())
            try:
                yield
            finally:
                self.policy.on_micro_batch = lambda: None

    def release_engine(self) -> None:
        """Engines give their memory to the trainer. Collective; nothing without rollout.server.memory_saver."""
        if not self.config.rollout.server.memory_saver:
            return
        if self.sleeping is not None:
            self.sleeping.release()
        gather(None, self.layout.world_gloo)
        self.engine_released = True

    def resume_engine(self) -> None:
        """The trainer's unused memory back to the engines, if they were released. Collective in the same way."""
        if not self.engine_released:
            return
        release_unused()
        gather(None, self.layout.world_gloo)
        if self.sleeping is not None:
            self.sleeping.resume()
        self.engine_released = False

    def _probe(self) -> tuple[np.ndarray, np.ndarray]:
        """(token ids int32 [L], the trainer's log-probs float32 [L - 1]) of the first question with its answer.

        Never in FP8: the probe asks whether the weights arrived, which rounding would only blur.
        """
        prompt = self.prompts.prompt(0)
        ids = np.concatenate([prompt.token_ids, self.tokenizer.encode(prompt.answer, add_special_tokens=False)])
        ids = ids[: self.config.policy.micro_batch_tokens].astype(np.int32)
        zeros = np.zeros(len(ids) - 1, dtype=np.float32)
        sample = TrainingSample(0, 0, ids, 1, zeros, zeros, correct=True, correct_rate=0.5)
        multiple, device = self.policy.pad_multiple, self.layout.device
        fillers = self.policy.round_num_micro_batches(1) - 1  # virtual stages need several micro-batches
        batches = [pack([sample], [0], multiple_of=multiple, device=device)]
        batches += [filler(multiple, device) for _ in range(fillers)]
        return ids, self.policy.compute_logprobs(batches, quantized=False)[0][: len(ids) - 1]

    def save(self) -> Path:
        """A checkpoint of the last complete step, unless there is one. Collective."""
        folder = folder_of(self.config.run_dir, self.state.step)
        if self.saved_step == self.state.step:
            return folder
        self.saved_step = self.state.step
        state = self.state
        if self.metrics is not None:  # a run that goes on from here still has to write its record
            self.take_stock()
            state = replace(state, figures=Metrics(*gather(self.metrics.state(), self.layout.world_gloo)).state())
        surplus = state.surplus if self.layout.is_replica_leader else None
        return self.store.save(state, lambda d: policy_checkpoint.save_sharded(self.policy, d), surplus)

    def take_stock(self) -> None:
        """Adds the seconds and the memory since the last call to the figures of the step."""
        step_metrics.add_memory(self.metrics, self.memory.take())
        now = time.perf_counter()
        if self.layout.rank == 0:
            total = now - self.clock if self.state.step else 0.0
            step_metrics.add_seconds(self.metrics, self.phases.take_seconds(), total)
        self.clock = now

    def close(self) -> None:
        """End what this rank started; safe to call after an error."""
        # The sync after the engine: servers of our own are gone then, others are told to leave the update group.
        for part in (*self.sinks, self.engine, self.sync, self.verifier, self.console, self.phases):
            part.close()


def open_trainer(
    config: Config, layout: ParallelLayout, phases: Phases, stop: StopSignals, console: Console
) -> Trainer:
    """Build every part, restore the newest checkpoint if there is one, and bring the engine to its weights."""
    spec = read_family(config.model.path)
    tokenizer = load_tokenizer(config.model.path, config.model.chat_template)
    prompts = PromptStream(
        config.data.train,
        tokenizer,
        max_prompt_tokens=config.data.max_prompt_tokens,
        over_long=config.data.over_long,
        shuffle=config.data.shuffle,
        seed=config.seed,
        system_prompt=config.model.system_prompt,
    )
    held_out = load_held_out(
        config.eval.data,
        tokenizer,
        max_prompt_tokens=config.data.max_prompt_tokens,
        over_long=config.data.over_long,
        seed=config.seed,
        system_prompt=config.model.system_prompt,
    )
    console.say(
        f"{prompts.num_prompts} training questions ({prompts.num_dropped} over "
        f"{config.data.max_prompt_tokens} tokens were dropped), {len(held_out.prompts)} held out"
    )
    if note := spec.padding_note(layout.tp_size):
        console.say(note)
    for warning in check_memory(config, spec, layout):
        console.say(warning)
    policy = Policy.create(config, spec, layout)
    console.say(f"optimizer: {policy.optimizer_kind}")
    identity = {
        "seed": config.seed,
        "model": asdict(spec),
        "data": _digest(config.data.train),
        "layout": {"tp": layout.tp_size, "pp": layout.pp_size, "dp": layout.dp_size},
    }
    store = CheckpointStore(config.run_dir, config.checkpoint.keep, identity, layout.world_gloo)
    state = _restore(config, spec, layout, policy, store, console)
    first_step = state.step + 1 if state.step else 0
    sinks = _open_sinks(config, first_step) if layout.rank == 0 else []
    metrics = _unwritten_figures(state, sinks, layout)
    verifier = VerifierPool(config.verify)
    engine = create_engine(config, layout)
    sync = WeightSync.create(config, spec, layout, engine)
    prompts.cursor = state.cursor
    memory = PhaseMemory(layout.device)
    phases.on_end = memory.note
    group = getattr(engine, "group", None)
    trainer = Trainer(
        config=config,
        layout=layout,
        phases=phases,
        stop=stop,
        console=console,
        spec=spec,
        policy=policy,
        tokenizer=tokenizer,
        prompts=prompts,
        held_out=held_out,
        engine=engine,
        sync=sync,
        verifier=verifier,
        loss=make_loss(config.algorithm),
        store=store,
        sinks=sinks,
        memory=memory,
        sleeping=SleepingServers(group, config.rollout.server, config.rollout.engine)
        if group and config.rollout.server.memory_saver
        else None,
        state=state,
        saved_step=state.step,
        metrics=metrics,
    )
    trainer.sync_weights(state.weight_version)
    gc.collect()
    gc.freeze()  # libraries, model and questions stay until the end: the collector need not walk them in every step
    return trainer


def _digest(paths: list[Path]) -> str:
    """SHA-256 over the training files: their order and content decide what a cursor means."""
    h = hashlib.sha256()
    for path in paths:
        with path.open("rb") as f:
            h.update(hashlib.file_digest(f, "sha256").digest())
    return h.hexdigest()


def _restore(
    config: Config, spec: ModelSpec, layout: ParallelLayout, policy: Policy, store: CheckpointStore, console: Console
) -> RunState:
    """The newest whole checkpoint, or the HF weights at step 0."""
    found = store.newest(console.say)
    if found is None:
        load_hf(policy.chunks, config.model.path, spec, layout)
        policy.reload_master_weights()
        return RunState()
    folder, manifest = found
    if config.checkpoint.resume == "never":
        raise ValueError(
            f"{config.run_dir} holds a checkpoint of step {manifest.step}, and checkpoint.resume is never: "
            "choose another run_dir, or set checkpoint.resume=auto to go on from it"
        )
    policy_checkpoint.load_sharded(policy, folder / "megatron")
    surplus = read_surplus(folder)
    draws = sorted({s.draw for s in surplus})
    mine = {d for i, d in enumerate(draws) if i % layout.dp_size == layout.dp_rank}
    console.say(f"going on from {folder} (step {manifest.step}, {len(draws)} surplus groups)")
    return RunState(
        step=manifest.step,
        weight_version=manifest.weight_version,
        cursor=manifest.cursor,
        optimizer_steps=manifest.optimizer_steps,
        surplus=tuple(s for s in surplus if s.draw in mine),
        figures=manifest.figures,
    )


def _open_sinks(config: Config, first_step: int) -> list[Sink]:
    sinks: list[Sink] = [JsonlSink(config.run_dir / "metrics.jsonl", first_step)]
    if config.metrics.tensorboard:
        sinks.append(TensorBoardSink(config.run_dir / "tensorboard", first_step))
    if config.metrics.wandb_project is not None:
        sinks.append(WandbSink(config.metrics.wandb_project, config.run_dir, config.model_dump(mode="json")))
    return sinks


def _unwritten_figures(state: RunState, sinks: list[Sink], layout: ParallelLayout) -> Metrics | None:
    """What is known of `state.step`, if its record is still to be written: of step 0, or after a stop in between.

    Collective; the first rank holds what a checkpoint says of all.
    """
    written = [s.last_step == state.step for s in sinks if isinstance(s, JsonlSink)]
    if largest(int(any(written)), layout.world_gloo) or (state.step and state.figures is None):
        return None
    return Metrics(state.figures or {}) if layout.rank == 0 else Metrics()


def write_resolved_config(config: Config) -> None:
    """run_dir/config.yaml; settings of an earlier start that differ are kept as config.1.yaml, config.2.yaml, …"""
    path, text = config.run_dir / "config.yaml", dump_config(config)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        number = 1 + sum(1 for _ in config.run_dir.glob("config.*.yaml"))
        path.rename(config.run_dir / f"config.{number}.yaml")
    path.write_text(text, encoding="utf-8")
