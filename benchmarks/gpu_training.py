"""All measurements of training in one process: its start, 20 s of imports and first kernels, is paid once.

    python benchmarks/gpu_training.py [PART …]      lm_head train_step packed_vs_padded fp8_curve graphs, in this order

A row that fails is noted and the next one runs. Rows that are in results.jsonl are not measured again.
"""

from __future__ import annotations

import importlib
import sys
import traceback

from gpu_common import free_memory

PARTS = ("lm_head", "train_step", "packed_vs_padded", "fp8_curve", "graphs")


def main() -> int:
    status = 0
    for part in sys.argv[1:] or PARTS:
        try:
            importlib.import_module(f"gpu_{part}").main()
        except Exception:  # the others need not suffer
            traceback.print_exc()
            status = 1
        free_memory()
    return status


if __name__ == "__main__":
    sys.exit(main())
