#!/bin/bash
# One trainer node, started by srun: runs torchrun with NFT_PROCS_PER_NODE ranks of `megatron-nft train "$@"`.
#
# When the file $NFT_STATUS_DIR/stop appears, the ranks get SIGUSR1: they finish or abandon the running phase, save, and
# end with 75. The signal goes to the ranks alone, by their ids; one from Slurm would reach torchrun and engines too.
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=/dev/null
[ -z "${NFT_SETUP:-}" ] || . "$NFT_SETUP"
NFT_NODE_DIR=$(mktemp -d "${TMPDIR:-/tmp}/nft-${SLURM_JOB_ID:-0}-XXXXXX") || exit 1
export NFT_NODE_DIR
trap 'rm -rf "$NFT_NODE_DIR"' EXIT
export NFT_BEFORE_OMP_NUM_THREADS=${OMP_NUM_THREADS:-} # torchrun sets it to 1 for its ranks; servers get this one
trap : TERM INT USR1 # torchrun gets Slurm's own signals as well; wait for it to end

"$NFT_PYTHON" -m torch.distributed.run \
    --nnodes="$NFT_TRAINER_NODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$NFT_PROCS_PER_NODE" \
    --master-addr="$NFT_MASTER_ADDR" --master-port="$NFT_MASTER_PORT" --no-python \
    bash "$here/rank.sh" "$NFT_PYTHON" -m megatron_nft train "$@" &
agent=$!
asked=
while kill -0 $agent 2>/dev/null; do
    if [ -z "$asked" ] && [ -e "$NFT_STATUS_DIR/stop" ]; then
        asked=yes
        for file in "$NFT_NODE_DIR"/rank-*.pid; do
            [ -s "$file" ] && kill -USR1 "$(cat "$file")" 2>/dev/null
        done
    fi
    sleep 1 &
    wait $!
done
wait $agent
