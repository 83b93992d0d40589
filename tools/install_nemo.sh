#!/bin/bash
# Makes .venv-nemo inside the checkout: NeMo-Run with the pins of tools/nemo_requirements.txt. About 500 MB.
#
#   bash tools/install_nemo.sh [--python PYTHON]
#
# A fresh environment of its own: NeMo-Run brings some 115 packages that the trainer has no use for. Done already: says
# so and ends at once. Interrupted: run it again.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
python=${PYTHON:-python3}
while (($#)); do
    case $1 in
        --python) python=${2:?--python needs an interpreter}; shift 2 ;;
        -h|--help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "install_nemo.sh: unknown argument '$1' (allowed: --python)" >&2; exit 2 ;;
    esac
done

venv=$root/.venv-nemo
marker=$venv/.installed
wanted=$(cat "$0" "$here/nemo_requirements.txt" | cksum)
exec 9<"$here/nemo_requirements.txt"
flock 9 || echo "$0: no lock on this file system; do not run two at a time" >&2
if [ -f "$marker" ] && [ "$(cat "$marker")" = "$wanted" ]; then
    echo "nemo-run: $venv is complete"
    exit 0
fi
rm -f "$marker"
[ -x "$venv/bin/pip" ] || "$python" -m venv --clear "$venv"
"$venv/bin/python" -m pip install -qq --disable-pip-version-check -r "$here/nemo_requirements.txt"
"$venv/bin/python" -c 'import nemo_run' || { echo "install_nemo.sh: nemo_run does not import" >&2; exit 1; }
echo "$wanted" >"$marker"
echo "nemo-run: $venv is ready"
