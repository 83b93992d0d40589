# Sourced by the installers: `torch_index` becomes pip's arguments for the build of torch that suits this machine.
#   NFT_TORCH_INDEX set      that index
#   no GPU                   PyTorch's own index of CPU builds, where it can be reached
#   else                     pip's default index
# An extra index is enough: of two equal versions pip prefers the one with a local label (2.13.0+cpu).
torch_index=()
if [ -n "${NFT_TORCH_INDEX:-}" ]; then
  torch_index=(--extra-index-url "$NFT_TORCH_INDEX")
elif ! nvidia-smi -L >/dev/null 2>&1; then
  cpu_index=https://download.pytorch.org/whl/cpu
  if "$python" - "$cpu_index" <<'PY' >/dev/null 2>&1
import sys, urllib.request
urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=10).close()
PY
  then torch_index=(--extra-index-url "$cpu_index"); fi
fi
