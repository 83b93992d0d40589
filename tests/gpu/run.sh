#!/usr/bin/env bash
# The GPU tests, on one GPU.   bash tests/gpu/run.sh [pytest arguments]      for example: -k fp8
# Where Python finds Transformer Engine and SGLang: see environment.sh. With OUT set, a JUnit file is written there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source tests/gpu/environment.sh
export NVIDIA_TF32_OVERRIDE=0  # Transformer Engine multiplies fp32 matrices in TF32, which is not what is compared here
exec "$PYTHON" -m pytest tests/gpu -p no:cacheprovider --durations=10 ${OUT:+--junitxml="$OUT/gpu-tests.xml"} "$@"
