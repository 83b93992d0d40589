#!/usr/bin/env bash
# The whole thing on a CPU: set up, make a tiny model, warm it up, train it with NFT, show accuracy before and after.
#   bash examples/quickstart/run.sh [--engine embedded|sglang] [--seed N] [--run-dir DIR] [--config FILE] [key=value …]
# key=value are settings of megatron-nft train, for example
#   policy.tensor_model_parallel_size=1 policy.pipeline_model_parallel_size=2
# PYTHON, NFT_TORCH_INDEX: see tools/setup_env.sh.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)

engine=embedded seed=0 run_dir="" config="$root/configs/quickstart.yaml" overrides=()
while [ $# -gt 0 ]; do
  case $1 in
    --engine) engine=${2:?--engine needs embedded or sglang}; shift 2 ;;
    --seed) seed=${2:?--seed needs a number}; shift 2 ;;
    --run-dir) run_dir=${2:?--run-dir needs a folder}; shift 2 ;;
    --config) config=${2:?--config needs a file}; shift 2 ;;
    -h | --help) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *=*) overrides+=("$1"); shift ;;
    *) echo "run.sh: unknown argument $1 (see --help)" >&2; exit 2 ;;
  esac
done
case $engine in
  embedded | sglang) ;;
  *) echo "run.sh: --engine is embedded or sglang, not $engine" >&2; exit 2 ;;
esac
run_dir=${run_dir:-$root/runs/quickstart-$engine-seed$seed}

bash "$root/tools/setup_env.sh"
[ "$engine" = embedded ] || bash "$root/tools/install_engine.sh" "$engine"
python="$root/.venv/bin/python"
# One thread per process: the two ranks share two cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# The same bits on every x86 processor with AVX2: torch and MKL else choose their kernels by the processor, and a last
# bit that differs leads to other answers, another warm-up and another run.
export ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=COMPATIBLE

[ -f "$run_dir/start/model/.warm" ] || {
  "$python" "$here/prepare.py" "$run_dir/start" --seed "$seed"
  touch "$run_dir/start/model/.warm"
}
"$python" -m megatron_nft train --config "$config" \
  run_dir="$run_dir" seed="$seed" rollout.engine="$engine" \
  model.path="$run_dir/start/model" \
  data.train="[$run_dir/start/task/train.jsonl]" eval.data="[$run_dir/start/task/held_out.jsonl]" \
  ${overrides[@]+"${overrides[@]}"}

echo "run folder: $run_dir (config.yaml, metrics.jsonl, tensorboard/, rollouts/, checkpoints/, hf/)"
"$python" "$here/summary.py" "$run_dir"
