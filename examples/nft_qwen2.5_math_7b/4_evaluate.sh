#!/usr/bin/env bash
# Evaluates a model with the paper's offline protocol: avg@32 on AIME and AMC, avg@1 elsewhere, temperature 0.6, top-p 0.7.
#   bash examples/nft_qwen2.5_math_7b/4_evaluate.sh [--dry-run] [MODEL [OUT]]
# MODEL defaults to the trained one, OUT to eval-hf beside it; data/models/NFT-7B is the published one. One node of 8 GPUs.
source "$(dirname "${BASH_SOURCE[0]}")/../published.sh"
model=${arguments[0]:-runs/nft_qwen2.5_math_7b/hf}
run "$python" -m megatron_nft eval --model "$model" --out "${arguments[1]:-$(dirname "$model")/eval-$(basename "$model")}" \
  --data data/datasets/VeRL_math_validation --engine sglang --protocol nft-7b \
  rollout.server.num_servers=2 rollout.server.tensor_parallel_size=4 verify.workers=8
