"""Everything that touches a Megatron model: families, layout, model, log-probs, optimizer, step, checkpoint."""

import warnings

from megatron_nft.policy.cudnn import use_bundled_cudnn

# Warnings that a user can do nothing about: at import megatron-core lists the optional packages that are missing
# (policy.model checks what it needs) and recommends an environment variable for old GPUs, it reads gradients of views,
# and torch 2.13 announces new names for collectives that megatron-core calls.
warnings.filterwarnings("ignore", module=r"megatron\.core")
warnings.filterwarnings("ignore", message=r".*`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf Tensor")

# Before megatron-core, which imports Transformer Engine.
use_bundled_cudnn()
