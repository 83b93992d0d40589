"""Code that runs inside vLLM's workers, in vLLM's environment: it may import torch, vLLM and nft_checksum alone.

vLLM gets this folder and that of nft_checksum on its PYTHONPATH, and
`--worker-extension-cls nft_vllm_extension.WeightReceiver`.
"""
