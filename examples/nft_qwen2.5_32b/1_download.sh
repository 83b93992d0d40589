#!/usr/bin/env bash
# Downloads Qwen2.5-32B, the published NFT-32B, DAPO-Math-17k, the validation sets, and the tokenizer of Qwen2.5-Math-7B for
# its chat template; shows size and checksum of each file.
#   bash examples/nft_qwen2.5_32b/1_download.sh [--dry-run] [NAME …]      names: python tools/download.py --help
source "$(dirname "${BASH_SOURCE[0]}")/../published.sh"
[ ${#arguments[@]} -gt 0 ] || arguments=(qwen2.5-32b nft-32b dapo-math-17k validation)
run "$python" "$root/tools/download.py" qwen2.5-math-7b --part tokenizer --to data
run "$python" "$root/tools/download.py" "${arguments[@]}" --to data
