"""All that touches a Megatron model: layout, model, log-probs, optimizer, step, checkpoint."""

import warnings

# Of no use to a person who runs this: megatron-core tells at import what is not installed (policy.model decides by
# itself what it needs), recommends an environment variable of old GPUs, and looks at gradients of views; torch 2.13
# announces new names for collectives that megatron-core calls.
warnings.filterwarnings("ignore", module=r"megatron\.core")
warnings.filterwarnings("ignore", message=r".*`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf Tensor")
