# shellcheck shell=bash
# What the scripts of the published runs share. Sourced by them; takes --dry-run and --help out of the arguments.
#   NFT_WORK    folder that gets data/ and runs/ (default: the checkout)
#   NFT_PYTHON  interpreter (default: the checkout's .venv, else python3)
set -euo pipefail
script=${BASH_SOURCE[1]}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${NFT_PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3)
dry_run="" arguments=()
for argument in "$@"; do
  case $argument in
    --dry-run) dry_run=1 ;;
    -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$script"; exit 0 ;;
    *) arguments+=("$argument") ;;
  esac
done
script=$(cd "$(dirname "$script")" && pwd)/$(basename "$script")
cd "${NFT_WORK:-$root}"

# Show a command and run it; with --dry-run only show it.
run() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  [ -n "$dry_run" ] || "$@"
}

# The newest complete checkpoint of a run folder; with --dry-run a name that stands for it.
newest_checkpoint() {
  local found
  found=$(find "$1/checkpoints" -maxdepth 1 -type d -name 'step_*' ! -name '*.partial' 2>/dev/null | sort | tail -n 1)
  if [ -z "$found" ]; then
    [ -n "$dry_run" ] || { echo "$(basename "$script"): no checkpoint below $1/checkpoints; run 3_train.sh first" >&2; return 1; }
    found=$1/checkpoints/step_NNNNNN
  fi
  echo "$found"
}

# The questions of both published runs: the authors' training set and validation sets, each AIME and AMC question 32 times.
prepare_questions() {
  local from=data/datasets/VeRL_math_validation
  local prepare=("$python" "$root/tools/prepare_data.py")
  run "${prepare[@]}" nft_dapo_math_17k data/questions/train.parquet --from "$from/dapo-math-17k_10boxed.parquet"
  run "${prepare[@]}" aime24 data/questions/aime24.parquet --from "$from/aime-2024-boxed_w_answer.parquet" --copies 32
  run "${prepare[@]}" aime25 data/questions/aime25.parquet --from "$from/aime2025_32_dapo_boxed_w_answer.parquet" --copies 32
  run "${prepare[@]}" amc23 data/questions/amc23.parquet --from "$from/amc2023_32_dapo_boxed_w_answer.parquet" --copies 32
  run "${prepare[@]}" math500 data/questions/math500.parquet --from "$from/math500_boxed.parquet"
  run "${prepare[@]}" olympiadbench data/questions/olympiadbench.parquet --from "$from/olympiadbench.parquet"
  run "${prepare[@]}" minerva data/questions/minerva.parquet --from "$from/minerva_math.parquet"
}

# train CONFIG JOB_SCRIPT SETTINGS…: submit the Slurm job, or without Slurm join the ranks of torchrun or start local ones.
train() {
  local config=$root/configs/$1 job=$root/launch_slurm/$2
  shift 2
  if [ "${NFT_SLURM:-$(command -v sbatch >/dev/null && echo 1 || echo 0)}" = 1 ]; then
    run env NFT_CONFIG="$config" bash "$job" "$@"
  else
    run "$python" -m megatron_nft train --config "$config" "$@"
  fi
}
