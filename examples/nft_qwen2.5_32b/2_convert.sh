#!/usr/bin/env bash
# Converts the questions into this project's layout and takes the chat template (with its system prompt) from the 7B
# model, as the reference does. Training reads the Hugging Face weights as they are; --weights also
# makes a Megatron checkpoint of them, for other programs that start from one.
#   bash examples/nft_qwen2.5_32b/2_convert.sh [--dry-run] [--weights]
source "$(dirname "${BASH_SOURCE[0]}")/../published.sh"
prepare_questions
run "$python" "$root/tools/chat_template.py" data/models/Qwen2.5-Math-7B data/models/qwen2.5-math-7b.jinja
if [ "${arguments[*]-}" = --weights ]; then
  run "$python" "$root/tools/convert_hf_to_megatron.py" data/models/Qwen2.5-32B data/megatron/Qwen2.5-32B --tp 8 --pp 2
elif [ ${#arguments[@]} -gt 0 ]; then
  echo "2_convert.sh: unknown argument ${arguments[0]} (see --help)" >&2
  exit 2
fi
