"""What ranks tell whoever started the servers, which may be another rank or a node of engines, by files that both see.

    FOLDER/hanging/<server>    a server that makes no progress: {"quiet_s": 120.0}; its owner takes the file and ends it
    FOLDER/good_steps          another text after each complete training step: the bound on restarts counts anew

A rank that has answers under way sees that a server hangs; its owner may have none, or no part in the generation at
all. No clocks are compared: a server that was started less than `quiet_s` ago is not the one that hung so long.
"""

from __future__ import annotations

import json
import re
import secrets
from pathlib import Path

from megatron_nft.files import write_atomically


class Owners:
    """The folder, for those who tell and those who listen."""

    def __init__(self, folder: Path, *, tells_steps: bool = False) -> None:
        """tells_steps: whether `tell_good_step` does something, which one rank of the run is enough for."""
        self._hanging, self._steps = folder / "hanging", folder / "good_steps"
        self._tells_steps = tells_steps
        self._heard = self._read_steps()

    def tell_hanging(self, url: str, quiet_s: float) -> None:
        """Have the server at `url` ended, which made no progress for `quiet_s` seconds. OSError."""
        self._hanging.mkdir(parents=True, exist_ok=True)
        write_atomically(self._file(url), json.dumps({"quiet_s": quiet_s}))

    def take_hanging(self, url: str) -> float | None:
        """For how long the server at `url` has made no progress, if somebody said so since the last call. OSError."""
        path = self._file(url)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        path.unlink(missing_ok=True)
        return float(json.loads(text)["quiet_s"])

    def tell_good_step(self) -> None:
        """Say that a training step is complete. OSError."""
        if self._tells_steps:
            write_atomically(self._steps, secrets.token_hex(8))

    def hear_good_step(self) -> bool:
        """Whether a training step was completed since the last call. OSError."""
        heard, self._heard = self._heard, self._read_steps()
        return heard != self._heard

    def _file(self, url: str) -> Path:
        return self._hanging / re.sub(r"[^\w.-]+", "_", url.rstrip("/"))

    def _read_steps(self) -> str:
        try:
            return self._steps.read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""
