"""|trainer log-prob - engine log-prob| of sampled tokens, settings that lower it, and what they cost.

A model of 113M parameters, warmed up on steps3. Target: mean at most 0.005 in bf16. The trainer attends with cuDNN, and
where the package flash-attn is installed, once more with FlashAttention, as the engine does, and once with
batch-invariant kernels on both sides (policy.batch_invariant; target at most 1e-4). Of that row, the rates stand beside
those of the first: tokens/s of the generation, and of the trainer's log-probs.
"""

from __future__ import annotations

import os
import time

import numpy as np
from gpu_common import ROOT, Results, verdict
from gpu_engines import LEAST_COMPILATION, checked_sync
from gpu_servers import config_for, running
from gpu_task import make_task_policy, warm_model

from megatron_nft.config import PolicyConfig
from megatron_nft.data.packing import pack, plan_micro_batches, unpack
from megatron_nft.data.synthetic import MAX_RESPONSE_TOKENS, make_tokenizer, problems
from megatron_nft.engines.engine import Request, SamplingParams
from megatron_nft.engines.sync import open_weight_sync
from megatron_nft.policy import parallel
from megatron_nft.policy.batch_invariant import use_batch_invariant_kernels
from megatron_nft.policy.capability import read_gpu_stack
from megatron_nft.types import TrainingSample

QUESTIONS, ANSWERS = 256, 8
TRITON = ["--attention-backend=triton", *LEAST_COMPILATION[1:]]
SERVERS = {
    "bf16, FlashAttention 3": {},
    "fp32 LM head": {"fp32_lm_head": True},
    "batch-invariant": {"deterministic": True},
    "fp32 LM head, batch-invariant": {"fp32_lm_head": True, "deterministic": True},
    "Triton attention": {"extra_args": TRITON},
    "FP8 rollouts": {"quantization": "fp8"},
    "CUDA graphs off": {"cuda_graphs": False},
}


def differences(policy, engine) -> tuple[np.ndarray, float, float]:
    """(|difference| of every sampled token, tokens per second of the generation, and of the trainer's log-probs)."""
    encoded = make_tokenizer()([p.question for p in problems(QUESTIONS, seed=3)])["input_ids"]
    requests = [Request(np.array(ids, dtype=np.int32), ANSWERS, (i,)) for i, ids in enumerate(encoded)]
    started = time.perf_counter()
    answers = list(engine.generate(requests, SamplingParams(MAX_RESPONSE_TOKENS)))
    seconds = time.perf_counter() - started
    samples = []
    for i, k, c in answers:
        ids = np.concatenate([requests[i].prompt_ids, c.token_ids]).astype(np.int32)
        samples.append(TrainingSample(i, k, ids, len(requests[i].prompt_ids), c.logprobs, None, True, 0.5))
    plan = plan_micro_batches([len(s.input_ids) for s in samples], 8192, multiple_of=policy.pad_multiple)
    batches = [pack(samples, part, multiple_of=policy.pad_multiple, device=policy.layout.device) for part in plan]
    found = []
    started = time.perf_counter()
    rows = policy.compute_logprobs(batches)  # on the host: all is done
    trainer_s = time.perf_counter() - started
    for batch, logprobs in zip(batches, rows, strict=True):
        for position, values in zip(batch.sample_ids, unpack(logprobs, batch), strict=True):
            found.append(np.abs(values - samples[position].rollout_logprobs))
    all_of_them = np.concatenate(found)
    return all_of_them, len(all_of_them) / seconds, sum(batch.tokens.numel() for batch in batches) / trainer_s


def measure(policy, layout, model, server: dict, at_most: float = 0.005) -> dict:
    config = config_for(model, server={"max_running_requests": 256, **server}, sync={"verify_checksums": False})
    with running(config, layout) as engine:
        sync = open_weight_sync(config, policy.spec, layout, engine)
        checked_sync(policy, sync, version=1)
        differences(policy, engine)  # fills caches
        gap, rate, trainer_rate = differences(policy, engine)
        sync.close()
    return {
        "mean": float(gap.mean()),
        "max": float(gap.max()),
        "99 %": float(np.quantile(gap, 0.99)),
        "tokens": int(gap.size),
        "tokens/s": rate,
        "trainer tokens/s": trainer_rate,
        "target": "" if "quantization" in server else verdict(float(gap.mean()), at_most=at_most),
    }


def main() -> None:
    results = Results(
        "agreement", f"{QUESTIONS} questions x {ANSWERS} answers of steps3, 113M parameters, temperature 1."
    )
    layout = parallel.initialize(PolicyConfig(), seed=1)
    model = warm_model(layout, ROOT / "runs" / "gpu", seconds=120)
    policy = make_task_policy(layout, model, attention_backend="fused")
    for name, server in SERVERS.items():
        results.measure(name, lambda server=server: measure(policy, layout, model, server))
    if not read_gpu_stack(layout.device).flash_attention:
        print("agreement | FlashAttention on both sides | not measured: the package flash-attn is not installed")
        return
    forget_attention_backend()
    same = make_task_policy(layout, model, attention_backend="flash")
    results.measure("FlashAttention on both sides", lambda: measure(same, layout, model, {}))
    forget_attention_backend()
    invariant = make_task_policy(layout, model, batch_invariant=True, rollout={"engine": "sglang"})
    row = "batch-invariant on both sides"
    found = results.measure(row, lambda: measure(invariant, layout, model, {"deterministic": True}, at_most=1e-4))
    plain = results.get("bf16, FlashAttention 3")
    if found and plain:
        rates = {f"share of {name}": found[name] / plain[name] for name in ("tokens/s", "trainer tokens/s")}
        results.add("cost of batch-invariant kernels", **rates)
    use_batch_invariant_kernels(False)


def forget_attention_backend() -> None:
    """Megatron sets these variables for a model and refuses others for the next."""
    for variable in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN"):
        os.environ.pop(variable, None)


if __name__ == "__main__":
    main()
