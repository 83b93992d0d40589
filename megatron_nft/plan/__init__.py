"""`megatron-nft plan`: memory, time and layout of a run, worked out before it is queued. Pure Python."""
