"""The policy as a folder in Hugging Face format: sharded safetensors, index, config, tokenizer, chat template.

Every pipeline stage's leader streams its own tensors into its own files; a bucket is all that a rank holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_nft.distributed import gather_objects, run_everywhere
from megatron_nft.policy.family import ModelSpec
from megatron_nft.policy.parallel import ParallelLayout
from megatron_nft.weights.buckets import plan_stage
from megatron_nft.weights.export import Buffers, export_buckets
from megatron_nft.weights.hf_writer import (
    file_names,
    finish_folder,
    open_partial,
    partial_of,
    split_into_files,
    write_file,
)
from megatron_nft.weights.receivers import nobody


class ExportError(RuntimeError):
    """A folder that could not be written; nothing new stands under its name."""


def save_hf(
    chunks: Sequence[torch.nn.Module],
    spec: ModelSpec,
    layout: ParallelLayout,
    source_model_path: Path | str,
    out_dir: Path | str,
    dtype: torch.dtype | None = None,
    *,
    bucket_bytes: int = 512 << 20,
    max_file_bytes: int = 5 << 30,
    replace: bool = False,
    chat_template: Path | None = None,
) -> None:
    """Write the policy's weights as `out_dir`. Collective: every rank calls it.

    source_model_path  the folder that config, tokenizer and chat template come from.
    dtype              of the tensors; None keeps the parameters' own.
    replace            an existing `out_dir` is replaced once the new one is whole; else it is refused.
    chat_template      a Jinja file that takes the place of the source's template.
    Raises ExportError on every rank, with no `out_dir` made and an existing one untouched.
    """
    out, source = Path(out_dir), Path(source_model_path)
    is_first = layout.rank == 0
    run_everywhere(lambda: open_partial(out, replace) if is_first else None, layout.world_gloo, ExportError)
    leads = layout.is_stage_leader
    metas_of_buckets = [plan.metas for plan in plan_stage(chunks, spec, layout, bucket_bytes, dtype)] if leads else []
    files = split_into_files(metas_of_buckets, max_file_bytes)
    counts = gather_objects(len(files), layout.world_gloo)
    names = file_names(sum(counts))[sum(counts[: layout.rank]) :][: len(files)]

    buffers = Buffers(bucket_bytes, layout.device)
    stream = export_buckets(chunks, spec, layout, buffers, dtype=dtype, receivers=nobody(layout))

    def write() -> None:
        try:
            for metas, name in zip(files, names, strict=True):
                write_file(partial_of(out) / name, metas, stream)
        finally:
            for _ in stream:  # the other ranks of the stage must not be left waiting
                pass

    run_everywhere(write, layout.world_gloo, ExportError)
    listed = [(m.name, name, m.end - m.start, m.dtype) for metas, name in zip(files, names, strict=True) for m in metas]
    tensors = [entry for of_rank in gather_objects(listed, layout.world_gloo) for entry in of_rank]

    def finish() -> None:
        if is_first:
            file_of = {tensor: name for tensor, name, _, _ in tensors}
            total = sum(nbytes for _, _, nbytes, _ in tensors)
            finish_folder(out, source, file_of, total, tensors[0][3], chat_template)

    run_everywhere(finish, layout.world_gloo, ExportError)
