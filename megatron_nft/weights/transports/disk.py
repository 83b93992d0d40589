"""The `disk` transport: safetensors files in the run folder, which the engines must see under the same path."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_nft.weights.buckets import Bucket
from megatron_nft.weights.hf_writer import write_file
from megatron_nft.weights.transports.servers import ServerTransport


class DiskTransport(ServerTransport):
    """Has the stage leaders write one file per bucket; the engines read them all at the end."""

    name = "disk"
    _num_files = 0

    @property
    def _folder(self) -> Path:
        return self._config.run_dir.resolve() / "sync" / "weights"

    def begin(self, version: int) -> None:
        super().begin(version)
        self._num_files = 0
        if self._layout.rank == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)

    def send(self, bucket: Bucket) -> None:
        self._ledger.note(bucket.metas)
        name = f"model-{self._layout.pp.rank:03d}-{self._num_files:05d}.safetensors"
        write_file(self._folder / name, bucket.metas, iter([bucket]))
        self._num_files += 1

    def finish(self, version: int) -> None:
        self._each(lambda server: server.load_folder(self._folder, version))
        super().finish(version)

    def resume(self, version: int) -> None:
        super().resume(version)
        if self._layout.rank == 0:  # all engines have loaded: that was agreed on before
            shutil.rmtree(self._folder)
