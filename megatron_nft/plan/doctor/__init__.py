"""`megatron-nft doctor`: would a run with these settings start on these nodes, and if not, what has to be mended?"""
