"""Code that runs inside an engine's worker, in the engine's environment: it may import torch and the engine alone.

vLLM gets this folder on its PYTHONPATH and `--worker-extension-cls nft_vllm_extension.WeightReceiver`.
"""
