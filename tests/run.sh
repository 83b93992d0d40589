#!/usr/bin/env bash
# Sets up and runs all tests: unit, distributed (gloo ranks), engines (real SGLang and vLLM servers), slurm (a real one).
#   bash tests/run.sh [pytest arguments]      for example: bash tests/run.sh tests/unit -k packing
# PYTHON, NFT_TORCH_INDEX: see tools/setup_env.sh. NFT_DATA_DIR: public benchmark files (default ../shared/data).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_env.sh dev
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
.venv/bin/ruff check .
[ $# -eq 0 ] || exec .venv/bin/python -m pytest "$@"

# The environments of the engines and of NeMo-Run are made while the unit tests run.
log=$(mktemp)
set -m  # a process group of its own, so that nothing of it is left when we are interrupted
{ bash tools/install_engine.sh sglang && bash tools/install_engine.sh vllm && bash tools/install_nemo.sh; } >"$log" 2>&1 &
installing=$!
set +m
trap 'kill -- "-$installing" 2>/dev/null || true; rm -f "$log"' EXIT

# Servers, ranks and a Slurm that die at a chosen moment depend on what else the machine does: what failed is tried once
# more, by itself. A test that fails twice fails; one that failed once is in the output.
run_tests() {
    local status=0
    .venv/bin/python -m pytest --durations=20 "$@" || status=$?
    ((status == 1)) || return "$status"
    echo "tests/run.sh: the tests that failed are tried once more"
    .venv/bin/python -m pytest --last-failed "$@"
}

status=0
run_tests tests/unit || status=$?
wait "$installing" || { cat "$log"; exit 1; }
cat "$log"
run_tests tests/[!u]*/ || status=$?
exit "$status"
