"""Everything that touches a Megatron model: families, layout, model, log-probs, optimizer, step, checkpoint."""

import warnings

# Warnings that a user can do nothing about: at import megatron-core lists the optional packages that are missing
# (policy.model checks what it needs) and recommends an environment variable for old GPUs, it reads gradients of views,
# and torch 2.13 announces new names for collectives that megatron-core calls.
warnings.filterwarnings("ignore", module=r"megatron\.core")
warnings.filterwarnings("ignore", message=r".*`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf Tensor")
