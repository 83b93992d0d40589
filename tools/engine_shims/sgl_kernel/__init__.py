"""Stands in for SGLang's compiled kernels on a CPU: every name exists, and calling one says that it is missing.

SGLang imports `sgl_kernel` in any case; with the torch_native attention and the pytorch sampler no kernel is called.
"""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} needs a GPU build of SGLang")

    missing.__name__ = name
    return missing
