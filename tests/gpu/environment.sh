# Sourced by tests/gpu/run.sh and benchmarks/gpu.sh: puts Transformer Engine, megatron-core and our package on
# PYTHONPATH, and finds SGLang. On a machine without a network they come from offline bundles (te-*.tar.xz,
# extras.tar.xz, sgl-*.tar.xz.part* with sgl-extras.tar.xz), which are unpacked once; parts may arrive in several runs
# and are kept. Without a CUDA device nothing is unpacked, and gpu_found is "".
#   NFT_GPU_BUNDLES  folder of the bundles (default: .carry of the checkout, then ../shared/gpu)
#   NFT_GPU_HOME     where they are kept and unpacked (default: $HOME)
#   PYTHON           (default: python3)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PYTHON=${PYTHON:-python3}
gpu_home=${NFT_GPU_HOME:-$HOME}
site=$gpu_home/site sgl=$gpu_home/sgl bundles=$gpu_home/nft-bundles

gpu_found=$("$PYTHON" -c 'import torch; print("yes" if torch.cuda.is_available() else "")' || true)
for folder in "${NFT_GPU_BUNDLES:-}" "$root/.carry" "$root/../shared/gpu"; do
  [ -n "$gpu_found" ] && [ -n "$folder" ] && [ -d "$folder" ] || continue
  mkdir -p "$bundles"
  for file in "$folder"/*.tar.xz "$folder"/*.tar.xz.part*; do
    if [ -f "$file" ] && [ ! -f "$bundles/$(basename "$file")" ]; then
      cp "$file" "$bundles/.copying" && mv "$bundles/.copying" "$bundles/$(basename "$file")"
    fi
  done
done

if [ ! -f "$site/.unpacked" ] && compgen -G "$bundles/te-*.tar.xz" > /dev/null; then
  mkdir -p "$site"
  tar -C "$site" -xJf "$bundles"/te-*.tar.xz
  [ ! -f "$bundles/extras.tar.xz" ] || tar -C "$site" -xJf "$bundles/extras.tar.xz"
  touch "$site/.unpacked"
fi
if [ ! -f "$sgl/.unpacked" ] && compgen -G "$bundles/sgl-*.part*" > /dev/null; then
  rm -rf "$sgl" && mkdir -p "$sgl"
  if cat "$bundles"/sgl-*.part* | tar -C "$sgl" -xJ; then
    [ ! -f "$bundles/extras.tar.xz" ] || tar -C "$sgl" -xJf "$bundles/extras.tar.xz" --wildcards './torch_memory_saver*'
    [ ! -f "$bundles/sgl-extras.tar.xz" ] || tar -C "$sgl" -xJf "$bundles/sgl-extras.tar.xz"
    touch "$sgl/.unpacked"
  else
    echo "the SGLang bundle is not complete yet: $(ls "$bundles" | grep -c '^sgl-.*part') part(s) are here" >&2
    rm -rf "$sgl"
  fi
fi

PYTHONPATH=$root
[ ! -f "$site/.unpacked" ] || PYTHONPATH=$PYTHONPATH:$site
export PYTHON PYTHONPATH HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
[ ! -f "$sgl/.unpacked" ] || export NFT_SGLANG_PYTHONPATH=$sgl
