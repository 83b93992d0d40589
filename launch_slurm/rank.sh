#!/bin/bash
# One rank, started by torchrun: runs "$@" and notes how it ended as $NFT_STATUS_DIR/rank-$RANK ("time status node").
#
# 75 means that the rank saved its state and wants to be run again. torchrun would take it for a failure and end the
# other ranks, so it is 0 for torchrun; the launcher reads the note.
set -u
"$@" &
child=$!
for signal in TERM INT USR1; do
    # shellcheck disable=SC2064
    trap "kill -$signal $child 2>/dev/null" $signal
done
echo $$ >"$NFT_NODE_DIR/rank-$RANK.pid"
while :; do
    wait $child
    status=$?
    kill -0 $child 2>/dev/null || break # else a signal interrupted the wait
done
echo "$(date +%s.%N) $status ${SLURMD_NODENAME:-$(hostname)}" >"$NFT_STATUS_DIR/rank-$RANK.tmp"
mv "$NFT_STATUS_DIR/rank-$RANK.tmp" "$NFT_STATUS_DIR/rank-$RANK"
[ $status = 75 ] && exit 0
exit $status
