#!/bin/bash
# Makes the own environment of a rollout engine inside the checkout: .venv-sglang or .venv-vllm.
#
#   bash tools/install_engine.sh sglang|vllm [--python PYTHON] [--device auto|cpu|cuda] [--force]
#
# With a GPU: the plain released packages. Without one: pinned packages with the CPU build of torch and two small shims
# (tools/engine_shims). Done already: says so and ends at once. Interrupted: run it again, it goes on. Two at a time:
# the second waits for the first. NFT_TORCH_INDEX: see tools/setup_env.sh.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
engine=${1:-}
case $engine in
    sglang|vllm) shift ;;
    -h|--help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "install_engine.sh: unknown engine '$engine' (allowed: sglang, vllm)" >&2; exit 2 ;;
esac
python=${PYTHON:-python3}
device=auto
force=0
while (($#)); do
    case $1 in
        --python) python=${2:?--python needs an interpreter}; shift 2 ;;
        --device) device=${2:?--device needs auto, cpu or cuda}; shift 2 ;;
        --force) force=1; shift ;;
        *) echo "install_engine.sh: unknown argument '$1' (allowed: --python, --device, --force)" >&2; exit 2 ;;
    esac
done
if [ "$device" = auto ]; then
    device=cpu
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then device=cuda; fi
fi
case $device in cpu|cuda) ;; *) echo "install_engine.sh: --device is auto, cpu or cuda, not '$device'" >&2; exit 2 ;; esac
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null || {
    echo "install_engine.sh: '$python' is not Python 3.11 or 3.12; name one with --python" >&2; exit 2; }

venv=$root/.venv-$engine
requirements=$here/engine_requirements/$engine-$device.txt
marker=$venv/.installed
wanted=$(cat "$0" "$here/torch_index.sh" "$requirements" "$here"/engine_shims/*.py "$here"/engine_shims/*/*.py | cksum)

exec 9<"$requirements"
flock 9 || echo "$0: no lock on this file system; do not run two at a time" >&2
if [ "$force" = 0 ] && [ -f "$marker" ] && [ "$(cat "$marker")" = "$wanted" ]; then
    echo "$engine: $venv is complete"
    exit 0
fi

start=$SECONDS
rm -f "$marker"
[ "$force" = 0 ] || rm -rf "$venv"
echo "$engine: installing into $venv for $device (some minutes, 3 to 9 GB)"
[ -x "$venv/bin/python" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$venv"
pip=("$venv/bin/python" -m pip install -qq --disable-pip-version-check)

if [ "$device" = cuda ]; then
    "${pip[@]}" -r "$requirements"
else
    source "$here/torch_index.sh"
    "${pip[@]}" torch==2.13.0 ${torch_index[@]+"${torch_index[@]}"}
    "${pip[@]}" --no-deps -r "$requirements" ${torch_index[@]+"${torch_index[@]}"}
    if [ "$engine" = sglang ]; then
        site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        mkdir -p "$site/sgl_kernel"
        cp "$here/engine_shims/sgl_kernel/__init__.py" "$site/sgl_kernel/__init__.py"
        cp "$here/engine_shims/nft_torchvision_ops.py" "$site/nft_torchvision_ops.py"
        echo "import nft_torchvision_ops" > "$site/nft_torchvision_ops.pth"
    fi
fi

if [ "$engine" = sglang ]; then module=sglang.launch_server; else module=vllm.entrypoints.openai.api_server; fi
check=("$venv/bin/python" -c "import importlib.util as u; assert u.find_spec('$module'), '$module is missing'")
SGLANG_USE_CPU_ENGINE=$([ "$device" = cpu ] && echo 1 || echo 0) "${check[@]}"
echo "$wanted" > "$marker"
echo "$engine: done in $((SECONDS - start)) s"
