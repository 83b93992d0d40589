#!/usr/bin/env bash
# Converts the questions into this project's layout. Training reads the Hugging Face weights as they are; --weights also
# makes a Megatron checkpoint of them, for other programs that start from one.
#   bash examples/nft_qwen2.5_math_7b/2_convert.sh [--dry-run] [--weights]
source "$(dirname "${BASH_SOURCE[0]}")/../published.sh"
prepare_questions
if [ "${arguments[*]-}" = --weights ]; then
  run "$python" "$root/tools/convert_hf_to_megatron.py" data/models/Qwen2.5-Math-7B data/megatron/Qwen2.5-Math-7B --tp 4 --pp 1
elif [ ${#arguments[@]} -gt 0 ]; then
  echo "2_convert.sh: unknown argument ${arguments[0]} (see --help)" >&2
  exit 2
fi
