#!/usr/bin/env bash
# Downloads Qwen2.5-Math-7B, the published NFT-7B, DAPO-Math-17k and the validation sets; shows size and checksum of each.
#   bash examples/nft_qwen2.5_math_7b/1_download.sh [--dry-run] [NAME …]      names: python tools/download.py --help
source "$(dirname "${BASH_SOURCE[0]}")/../published.sh"
[ ${#arguments[@]} -gt 0 ] || arguments=(qwen2.5-math-7b nft-7b dapo-math-17k validation)
run "$python" "$root/tools/download.py" "${arguments[@]}" --to data
