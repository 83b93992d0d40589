"""Useful tokens per second of training, packed against padded to the longest, at long-tailed lengths.

A padded batch is run as what it costs: every sequence as long as the longest one. Both use the same kernels, so the
difference is the padding alone.
"""

from __future__ import annotations

import numpy as np
from gpu_common import Results, median_ms, spec_7b
from gpu_policies import likelihood_loss, make_config, make_samples, packed, random_policy

from megatron_nft.data.packing import plan_micro_batches
from megatron_nft.policy import parallel

CAP, LAYERS, ANSWERS = 16384, 4, 96
LONGEST = 4096


def lengths_of(sigma: float) -> list[int]:
    """Log-normal around 600 tokens, cut at LONGEST."""
    drawn = np.random.default_rng(0).lognormal(np.log(600), sigma, ANSWERS)
    return np.clip(drawn, 32, LONGEST).astype(int).tolist()


def measure(policy, lengths: list[int], useful: int) -> dict:
    splits = plan_micro_batches(lengths, CAP, multiple_of=policy.pad_multiple)
    batches = packed(policy, make_samples(lengths, policy.spec.vocab_size), splits)
    held = sum(b.tokens.numel() for b in batches)
    ms = median_ms(lambda: policy.train_step(batches, likelihood_loss, float(useful)), repeats=4, warmup=2)
    return {"micro-batches": len(splits), "full": useful / held, "ms": ms, "useful tokens/s": 1e3 * useful / ms}


def main() -> None:
    results = Results(
        "packed_vs_padded",
        f"{LAYERS} layers of Qwen2.5-7B's shape, V 32768, {ANSWERS} answers, log-normal lengths around 600 tokens, at "
        f"most {LONGEST}; micro-batches of {CAP} tokens; one optimizer step.",
    )
    config = make_config(
        "random",
        optimizer={"lr": 1e-6},  # weights of no meaning must stay finite
        data={"max_prompt_tokens": 1},
        rollout={"max_response_tokens": LONGEST},
        micro_batch_tokens=CAP,
    )
    policy = random_policy(parallel.initialize(config.policy, seed=1), spec_7b(LAYERS, vocab_size=32768), config)
    for sigma in (0.5, 1.0):
        lengths = lengths_of(sigma)
        useful, longest = sum(lengths), max(lengths)
        packed_row = results.measure(f"packed, sigma {sigma}", lambda: measure(policy, lengths, useful))  # noqa: B023
        padded = results.measure(f"padded, sigma {sigma}", lambda: measure(policy, [longest] * ANSWERS, useful))  # noqa: B023
        if packed_row and padded:
            results.add(f"packed / padded, sigma {sigma}", **{"useful tokens/s": padded["ms"] / packed_row["ms"]})


if __name__ == "__main__":
    main()
