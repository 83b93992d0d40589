#!/usr/bin/env bash
# Trains on 4 nodes x 8 GPUs: as a Slurm job where there is sbatch, else in the ranks of torchrun (or local ones).
#   bash examples/nft_qwen2.5_math_7b/3_train.sh [--dry-run] [--account=… --partition=…] [key=value …]
# NFT_SLURM=0 does without Slurm although it is there. NFT_CONFIG_NAME=rft_qwen2.5_math_7b trains a baseline.
source "$(dirname "${BASH_SOURCE[0]}")/../published.sh"
train "${NFT_CONFIG_NAME:-nft_qwen2.5_math_7b}.yaml" train_7b_4nodes.sbatch ${arguments[@]+"${arguments[@]}"}
