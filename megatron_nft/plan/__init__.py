"""`megatron-nft plan`: memory, time and layout of a run, calculated before the run is queued. Pure Python."""
