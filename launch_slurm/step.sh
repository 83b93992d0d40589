#!/bin/bash
# One task of a job step: sources the site's set-up (NFT_SETUP), then runs `python "$@"` with NFT_ADDRESS set.
set -u
# shellcheck source=/dev/null
[ -z "${NFT_SETUP:-}" ] || . "$NFT_SETUP"
NFT_ADDRESS=$("$NFT_PYTHON" "$(dirname "${BASH_SOURCE[0]}")/address.py") || exit 2
export NFT_ADDRESS
exec "$NFT_PYTHON" "$@"
