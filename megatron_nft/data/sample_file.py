"""Training samples in parquet: the surplus groups of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_nft.types import TrainingSample

SCHEMA = pa.schema(
    [
        ("draw", pa.int64()),
        ("sample_index", pa.int32()),
        ("step", pa.int64()),
        ("input_ids", pa.list_(pa.int32())),
        ("prompt_length", pa.int32()),
        ("rollout_logprobs", pa.list_(pa.float32())),
        ("behaviour_logprobs", pa.list_(pa.float32())),
        ("correct", pa.bool_()),
        ("reward", pa.float64()),  # null where the grader gave none
        ("correct_rate", pa.float64()),
        ("advantage", pa.float64()),
    ]
)
_ARRAYS = {"input_ids": np.int32, "rollout_logprobs": np.float32, "behaviour_logprobs": np.float32}


def write_samples(path: Path, samples: Sequence[TrainingSample]) -> None:
    """Write `samples` in order. The caller publishes the folder when it is whole (train/checkpoints.py)."""
    columns = {name: [getattr(s, name) for s in samples] for name in SCHEMA.names}
    pq.write_table(pa.table(columns, schema=SCHEMA), path)


def read_samples(path: Path) -> list[TrainingSample]:
    """Read the samples of `write_samples`, bit for bit."""
    names = {f.name for f in fields(TrainingSample)} & set(SCHEMA.names)
    rows = pq.read_table(path, schema=SCHEMA).to_pylist()
    out = []
    for row in rows:
        values = {k: row[k] for k in names}
        for key, dtype in _ARRAYS.items():
            values[key] = None if row[key] is None else np.asarray(row[key], dtype=dtype)
        out.append(TrainingSample(**values))
    return out
