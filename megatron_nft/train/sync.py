"""The policy's weights into the engine after every step, and the GPU memory that the two take turns with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch.distributed import barrier
from transformers import PreTrainedTokenizerBase

from megatron_nft.data.packing import filler, pack
from megatron_nft.data.prompts import PromptStream
from megatron_nft.engines.engine import Engine
from megatron_nft.policy.parallel import ParallelLayout
from megatron_nft.policy.policy import Policy
from megatron_nft.train.memory import release_unused
from megatron_nft.types import TrainingSample
from megatron_nft.weights.sync import WeightSync
from megatron_nft.weights.transport import WeightSyncError


def sync_weights(
    sync: WeightSync,
    engine: Engine,
    policy: Policy,
    stream: PromptStream,
    tokenizer: PreTrainedTokenizerBase,
    version: int,
) -> dict[str, float]:
    """The policy's weights into the engine as `version`, checked; seconds and bytes for the metrics. Collective."""
    probe = make_probe(policy, stream, tokenizer)
    resume_engine(engine, policy.layout)
    return sync.sync(policy.chunks, version, probe=probe).metrics()


def readmit(
    urls: Sequence[str],
    sync: WeightSync,
    policy: Policy,
    stream: PromptStream,
    tokenizer: PreTrainedTokenizerBase,
    version: int,
    say: Callable[[str], None],
) -> None:
    """The policy's weights, of `version`, into servers that came back without them. Collective.

    Servers that are lost again are left out, as before: the run has others, or its generation says that it has none.
    WeightSyncError where one answers but does not have the weights: it may say that it has, and would be asked.
    """
    try:
        sync.sync(policy.chunks, version, probe=make_probe(policy, stream, tokenizer), only=urls)
    except WeightSyncError as e:
        if not set(urls) <= sync.lost.keys():
            raise
        say(f"{', '.join(urls)} came back, but did not take the weights of version {version}: {e}")
    else:
        say(f"{', '.join(urls)} came back, and answers again under version {version} of the weights")


def release_engine(engine: Engine, layout: ParallelLayout) -> None:
    """Let the engines give their memory to the trainer. Collective; nothing without rollout.server.memory_saver."""
    engine.release_memory()
    if engine.memory_released:
        barrier(layout.world_gloo)  # nobody allocates before all engines of the host have let go


def resume_engine(engine: Engine, layout: ParallelLayout) -> None:
    """Give the trainer's unused memory back to the engines, if they had released theirs. Collective in the same way."""
    if not engine.memory_released:
        return
    release_unused()
    barrier(layout.world_gloo)  # no engine allocates before all trainers of the host have let go
    engine.resume_memory()


def make_probe(
    policy: Policy, stream: PromptStream, tokenizer: PreTrainedTokenizerBase
) -> tuple[np.ndarray, np.ndarray]:
    """(token ids int32 [L], the trainer's log-probs float32 [L - 1]) of the first question with its answer.

    Never in FP8: the probe asks whether the weights arrived, which rounding would only blur.
    """
    prompt = stream.prompt(0)
    ids = np.concatenate([prompt.token_ids, tokenizer.encode(prompt.answer, add_special_tokens=False)])
    ids = ids[: policy.config.policy.micro_batch_tokens].astype(np.int32)
    zeros = np.zeros(len(ids) - 1, dtype=np.float32)
    sample = TrainingSample(0, 0, ids, 1, zeros, zeros, correct=True, correct_rate=0.5)
    multiple, device = policy.pad_multiple, policy.layout.device
    fillers = policy.layout.round_num_micro_batches(1) - 1  # virtual stages need several micro-batches
    segments = policy.segment_multiple
    batches = [pack([sample], [0], multiple_of=multiple, segment_multiple=segments, device=device)]
    batches += [filler(multiple, device) for _ in range(fillers)]
    return ids, policy.compute_logprobs(batches, quantized=False)[0][: len(ids) - 1]
