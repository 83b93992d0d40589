"""megatron-nft whose SGLang and vLLM clients give the answers of another run: replay_train.py train --config …

The other run's folder is NFT_TEST_REPLAY. Servers are started, and weights are synced into them, as ever.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_nft.cli import main
from megatron_nft.data.rollout_file import list_rollout_files, read_rollout_file
from megatron_nft.engines.client import HttpEngine
from megatron_nft.engines.engine import Completion, OnWait, Request, SamplingParams


def recorded(run_dir: Path) -> dict[tuple[int, int], dict]:
    """(draw, sample) -> the row of that answer."""
    rows = [row for _, path in list_rollout_files(run_dir) for row in read_rollout_file(path).to_pylist()]
    return {(row["draw"], row["sample_index"]): row for row in rows}


def replay(run_dir: Path) -> None:
    """From here on HTTP engines answer from the files of `run_dir`."""
    rows = recorded(run_dir)

    def generate(
        self: HttpEngine, requests: Sequence[Request], sampling: SamplingParams, on_wait: OnWait | None = None
    ) -> Iterator[tuple[int, int, Completion]]:
        for number, request in enumerate(requests):
            for sample in range(request.num_samples):
                row = rows[request.seed_key[-1], sample]  # (seed, draw)
                assert row["prompt_ids"] == request.prompt_ids.tolist() and row["weight_version"] == self.weight_version
                ids = np.array(row["response_ids"], dtype=np.int32)
                logprobs = np.array(row["rollout_logprobs"], dtype=np.float32)
                yield number, sample, Completion(ids, logprobs, row["finish_reason"], self.weight_version)

    HttpEngine.generate = generate


if __name__ == "__main__":
    replay(Path(os.environ["NFT_TEST_REPLAY"]))
    sys.exit(main())
