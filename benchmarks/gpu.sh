#!/usr/bin/env bash
# Measurements on one GPU.   bash benchmarks/gpu.sh [PART …]     without PART: all of them, in this order
#   ceilings lm_head train_step packed_vs_padded fp8_curve weight_sync generation agreement graphs nft_run
# Each part takes at most NFT_PART_S seconds (480) and writes its rows as they come to results.jsonl and tables.md in
# OUT (default benchmarks/results/gpu). Run again, it goes on where it stopped; a row that is there is not measured again.
# Ends with 0 if every part did, 1 if one failed or there is no CUDA device, 2 for an unknown part.
# Where Python finds Transformer Engine and SGLang: tests/gpu/environment.sh.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
all=(ceilings lm_head train_step packed_vs_padded fp8_curve weight_sync generation agreement graphs nft_run)
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=("${all[@]}")
for part in "${parts[@]}"; do
  [ -f "benchmarks/gpu_$part.py" ] || { echo "gpu.sh: unknown part $part; parts: ${all[*]}" >&2; exit 2; }
done
source tests/gpu/environment.sh
[ -n "$gpu_found" ] || { echo "gpu.sh: no CUDA device: these measurements need a GPU (python: $PYTHON)" >&2; exit 1; }
export OUT=${OUT:-benchmarks/results/gpu} PYTHONPATH=$PYTHONPATH:$PWD/benchmarks:$PWD/tests/gpu:$PWD/tests
mkdir -p "$OUT"
kept=benchmarks/results/gpu/results.jsonl  # rows of earlier calls that wrote to another folder
[ -f "$OUT/results.jsonl" ] || [ ! -f "$kept" ] || cp "$kept" "$OUT/results.jsonl"
status=0
for part in "${parts[@]}"; do
  echo "== $part"
  timeout -k 20 "${NFT_PART_S:-480}" "$PYTHON" "benchmarks/gpu_$part.py" || { echo "== $part ended with $?" >&2; status=1; }
done
[ ! -f "$OUT/tables.md" ] || cat "$OUT/tables.md"
exit $status
