#!/usr/bin/env bash
# Evaluates a model with the paper's offline protocol: avg@32 on AIME and AMC, avg@1 elsewhere, temperature 1.0, top-p 0.7.
#   bash examples/nft_qwen2.5_32b/4_evaluate.sh [--dry-run] [MODEL [OUT]]
# MODEL defaults to the trained one, OUT to eval-hf beside it; data/models/NFT-32B is the published one. One node of 8 GPUs.
source "$(dirname "${BASH_SOURCE[0]}")/../published.sh"
model=${arguments[0]:-runs/nft_qwen2.5_32b/hf}
run "$python" -m megatron_nft eval --model "$model" --out "${arguments[1]:-$(dirname "$model")/eval-$(basename "$model")}" \
  --data data/datasets/VeRL_math_validation --engine sglang --protocol nft-32b \
  --chat-template data/models/qwen2.5-math-7b.jinja \
  rollout.server.num_servers=2 rollout.server.tensor_parallel_size=4 verify.workers=8
