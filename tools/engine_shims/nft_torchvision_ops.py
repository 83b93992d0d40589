"""Declares the two operators that `import torchvision` looks up, for a torchvision whose compiled part does not load.

The torchvision of the package index is built for CUDA, and SGLang imports it: 0.28.0 fails beside a CPU build of torch
2.13 ("operator torchvision::nms does not exist"). Beside a build of torch with CUDA its compiled part loads, on a
machine without a GPU too: it declares the operators itself then, and a second declaration would abort the process.

A `.pth` file imports this at start-up; it acts once, at the first import of torchvision: torch is not imported early.
"""

import importlib.abc
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

_library: Any = None  # torch unregisters the operators when the Library object goes


class _DeclareOnImport(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchvision":
            global _library
            sys.meta_path.remove(self)
            import torch

            load: Any = torch.ops.load_library
            found = PathFinder.find_spec(name, path)
            compiled = [Path(folder) / "_C.so" for folder in found.submodule_search_locations or ()] if found else []
            try:
                for file in compiled:
                    load(file)
            except OSError:
                library: Any = torch.library  # its functions have no types
                _library = library.Library("torchvision", "DEF")
                for operator in ("nms", "qnms"):
                    _library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _DeclareOnImport())
