#!/usr/bin/env bash
# Makes .venv in the checkout and installs megatron_nft into it; does nothing when that is done already.
#   bash tools/setup_env.sh [EXTRA …]        extras of setup.py, for example dev
# PYTHON                       interpreter to use (3.11 or 3.12; default python3.11, then python3.12, then python3)
# VENV                         where to make it (default .venv)
# NFT_TORCH_INDEX              package index for torch; without a GPU the default is PyTorch's index of CPU builds
#                              (torch_index.sh)
# TORCH_VERSION                default 2.13.0
# MEGATRON_CORE_VERSION        default: the newest that setup.py allows
# TRANSFORMER_ENGINE_VERSION   likewise, with the extra te
# Which versions were tested together: megatron_nft/policy/stack.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-.venv}
extras=$(IFS=,; echo "$*")

python=${PYTHON:-}
if [ -z "$python" ]; then
  for candidate in python3.11 python3.12 python3; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))'; then
      python=$candidate
      break
    fi
  done
fi
[ -n "$python" ] || { echo "setup_env.sh: no Python 3.11 or 3.12 found; install one or set PYTHON" >&2; exit 1; }

# What the environment was made from: a change of any of it makes it anew or brings it up to date.
version=$("$python" -c 'import platform; print(platform.python_version())')
sources=$(cat setup.py pyproject.toml tools/setup_env.sh tools/torch_index.sh | sha256sum | cut -d' ' -f1)
stamp="$sources [$extras] Python $version torch ${TORCH_VERSION:-2.13.0}"
stamp+=" megatron-core ${MEGATRON_CORE_VERSION:-} Transformer Engine ${TRANSFORMER_ENGINE_VERSION:-}"
if [ -x "$venv/bin/megatron-nft" ] && [ "$(cat "$venv/.installed" 2>/dev/null)" = "$stamp" ]; then exit 0; fi

if ! "$python" -m venv --help >/dev/null 2>&1 || ! "$python" -c 'import ensurepip' 2>/dev/null; then
  echo "setup_env.sh: $python has no venv module; installing it needs root: apt-get install -y python3-venv" >&2
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-venv
  else
    exit 1
  fi
fi

echo "setting up $venv with $("$python" --version) (some minutes the first time)"
# One of another Python is made anew.
[ "$("$venv/bin/python" -c 'import platform; print(platform.python_version())' 2>/dev/null)" = "$version" ] ||
  "$python" -m venv --clear "$venv"
rm -f "$venv/.installed"
pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)
"${pip[@]}" install --upgrade pip "setuptools>=77" wheel
# torch by itself and first: an open range would take whatever build the default index has newest.
source tools/torch_index.sh
"${pip[@]}" install ${torch_index[@]+"${torch_index[@]}"} "torch==${TORCH_VERSION:-2.13.0}"
constraints=$venv/constraints.txt
{
  echo "torch==${TORCH_VERSION:-2.13.0}" # whatever is installed next must not replace it
  [ -z "${MEGATRON_CORE_VERSION:-}" ] || echo "megatron-core==$MEGATRON_CORE_VERSION"
  [ -z "${TRANSFORMER_ENGINE_VERSION:-}" ] || echo "transformer-engine==$TRANSFORMER_ENGINE_VERSION"
} >"$constraints"
packages=(--editable ".${extras:+[$extras]}")
case ",$extras," in
*,te,*)
  # Transformer Engine's torch part is compiled here. In an environment of pip's own it would be compiled against
  # whatever torch is newest; so without one. Its core comes as a wheel for the CUDA of this torch.
  cuda=$("$venv/bin/python" -c 'import torch; print((torch.version.cuda or "").partition(".")[0])')
  [ -n "$cuda" ] || {
    echo "setup_env.sh: the extra te needs a torch with CUDA; set NFT_TORCH_INDEX, see docs/cluster.md" >&2
    exit 1
  }
  packages+=(--no-build-isolation "transformer-engine[core_cu$cuda,pytorch]")
  ;;
esac
"${pip[@]}" install --constraint "$constraints" "${packages[@]}"
echo "$stamp" > "$venv/.installed"
