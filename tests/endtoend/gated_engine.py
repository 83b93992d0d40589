"""The server that only waits (benchmarks/waiting_engine.py), with a gate for the answers of held-out questions.

They are those with a limit of HELD_OUT_TOKENS. POST /allow {"count": N} lets N more of them through; POST /held_out
tells how many wait, and under which version each was answered so far, in the order of their ends.
"""

from __future__ import annotations

import sys
import threading
from typing import Any, ClassVar

import waiting_engine

HELD_OUT_TOKENS = 95  # more than an answer of the training may have left


class Handler(waiting_engine.Handler):
    changed = threading.Condition()
    allowed, waiting = 0, 0
    versions: ClassVar[list[int]] = []

    def _generate(self, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
        if body["sampling_params"]["max_new_tokens"] != HELD_OUT_TOKENS:
            return super()._generate(body)
        cls = type(self)
        with cls.changed:
            cls.waiting += 1
            cls.changed.wait_for(lambda: cls.allowed > 0)
            cls.waiting -= 1
            cls.allowed -= 1
        answer, status = super()._generate(body)
        with cls.changed:
            cls.versions.append(int(answer["meta_info"]["weight_version"]))
        return answer, status

    def _allow(self, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
        cls = type(self)
        with cls.changed:
            cls.allowed += body["count"]
            cls.changed.notify_all()
        return {}, 200

    def _held_out(self, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
        with type(self).changed:
            return {"waiting": self.waiting, "versions": self.versions}, 200


if __name__ == "__main__":
    waiting_engine.Handler = Handler
    sys.exit(waiting_engine.main())
