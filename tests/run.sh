#!/usr/bin/env bash
# Sets up and runs the tests of level 1, which CI runs; with --long those of level 2 too. See docs/testing.md.
#   bash tests/run.sh [--long] [pytest arguments]      for example: bash tests/run.sh tests/unit -k packing
# With pytest arguments only pytest runs, without the checks of style and types and without the other environments.
# PYTHON, NFT_TORCH_INDEX: see tools/setup_env.sh. NFT_DATA_DIR: public benchmark files (default ../shared/data).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
level=()
newer=(tests/unit/test_imports.py tests/unit/test_policy_cpu.py tests/unit/test_policy_stack.py
       tests/distributed/test_gradient.py tests/stacks)
if [ "${1:-}" = --long ]; then
    level=(-m "")
    newer=(tests)
    shift
fi

bash tools/setup_env.sh dev
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
results=build/tests
mkdir -p "$results"
run_pytest() {  # NAME and pytest's arguments; durations and results go to build/tests/NAME.xml
    "${PYTEST_PYTHON:-.venv/bin/python}" -m pytest --durations=20 --junitxml="$results/$1.xml" ${level[@]+"${level[@]}"} "${@:2}"
}
if [ $# -gt 0 ]; then run_pytest selected "$@"; exit; fi

.venv/bin/ruff check .
.venv/bin/ruff format --check .

# Side by side, as the tests wait a good deal: unit tests and ranks; the environments and then the tests of real servers;
# types. What measures time comes last and alone.
groups=()
in_background() {  # NAME COMMAND …: its output goes to build/tests/NAME.log; its process id to $started
    set -m  # a process group of its own, so that nothing of it is left when we are interrupted
    "${@:2}" </dev/null >"$results/$1.log" 2>&1 &
    started=$!
    set +m
    groups+=("$started")
}
end_groups() { for group in "${groups[@]}"; do kill -- "-$group" 2>/dev/null || true; done; }
install_and_test_servers() {
    PYTHONPATH=tests/browser:tests/slurm .venv/bin/python -c \
        'import chromium, cluster; print("chromium:", *chromium.find_or_install(), "slurm:", cluster.missing_reason())'
    bash tools/install_engine.sh sglang && bash tools/install_engine.sh vllm && bash tools/install_nemo.sh || return 1
    run_pytest servers tests/engines tests/slurm tests/gpu
}
test_newer_stack() {  # Python 3.12 with the newest megatron-core, where there is one beside the default Python
    local python
    python=$(.venv/bin/python tests/other_python.py) || { echo "$python"; return 0; }
    VENV=.venv-3.12 PYTHON=$python bash tools/setup_env.sh dev || return 1
    PYTEST_PYTHON=.venv-3.12/bin/python run_pytest newer "${newer[@]}"
}
trap end_groups EXIT
in_background servers install_and_test_servers
servers=$started
in_background mypy .venv/bin/mypy
types=$started
newer_stack=
if [ ${#level[@]} = 0 ]; then
    in_background newer test_newer_stack
    newer_stack=$started
fi

status=0
run_pytest unit tests/unit --numprocesses=2 --dist=loadfile || status=$?
run_pytest ranks tests/distributed tests/endtoend tests/hosts || status=$?
wait "$servers" || status=$?
cat "$results/servers.log"
if [ -n "$newer_stack" ]; then
    wait "$newer_stack" || status=$?
    cat "$results/newer.log"
fi
run_pytest browser tests/browser || status=$?
[ -n "$newer_stack" ] || test_newer_stack || status=$?
wait "$types" || status=$?
cat "$results/mypy.log"
exit "$status"
