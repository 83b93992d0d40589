#!/usr/bin/env bash
# Tests and measurements on one GPU, in the order of their worth.   bash benchmarks/gpu.sh [--minutes N] [PART …]
# Without PART: all that are missing. With --minutes it ends within them, set-up included, and goes on in the next call;
# without, each part has eight minutes. Rows come to results.jsonl and tables.md in OUT (default
# benchmarks/results/gpu); a row that is there is not measured again.
# Ends with 0 if every part that was begun did, 1 if one failed, could not start, or there is no CUDA device.
# Parts and their order: gpu_session.py. Where Python finds Transformer Engine and SGLang: tests/gpu/environment.sh.
set -euo pipefail
begun=$SECONDS
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tests/gpu/environment.sh
[ -n "$gpu_found" ] || { echo "gpu.sh: no CUDA device: these measurements need a GPU (python: $PYTHON)" >&2; exit 1; }
export OUT=${OUT:-benchmarks/results/gpu} PYTHONPATH=$PYTHONPATH:$PWD/benchmarks:$PWD/tests/gpu:$PWD/tests
export NVIDIA_TF32_OVERRIDE=0  # as tests/gpu/run.sh does
mkdir -p "$OUT"
for kept in results.jsonl done.json; do  # of earlier calls that wrote to another folder
  [ -f "$OUT/$kept" ] || [ ! -f "benchmarks/results/gpu/$kept" ] || cp "benchmarks/results/gpu/$kept" "$OUT/$kept"
done
status=0
"$PYTHON" benchmarks/gpu_session.py --spent-s $((SECONDS - begun)) "$@" || status=$?
[ ! -f "$OUT/tables.md" ] || cat "$OUT/tables.md"
exit $status
