#!/usr/bin/env bash
# Writes a checkpoint as a Hugging Face folder. (The end of a run is there already, as runs/nft_qwen2.5_math_7b/hf.)
#   bash examples/nft_qwen2.5_math_7b/5_export.sh [--dry-run] [CHECKPOINT [OUT]]
# CHECKPOINT defaults to the newest of the run.
source "$(dirname "${BASH_SOURCE[0]}")/../published.sh"
checkpoint=${arguments[0]:-$(newest_checkpoint runs/nft_qwen2.5_math_7b)}
run "$python" "$root/tools/convert_megatron_to_hf.py" "$checkpoint" "${arguments[1]:-runs/nft_qwen2.5_math_7b/hf-$(basename "$checkpoint")}"
