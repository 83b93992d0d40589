"""Declares the two operators that `import torchvision` looks up, for a torchvision whose compiled part does not load.

A `.pth` file imports this at start-up; it acts once, at the first import of torchvision: torch is not imported early.
"""

import importlib.abc
import sys

_library = None  # torch unregisters the operators when the Library object goes


class _DeclareOnImport(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            global _library
            sys.meta_path.remove(self)
            import torch

            _library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                _library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _DeclareOnImport())
