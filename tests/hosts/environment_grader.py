"""A grader that writes its environment to the file that the reference answer names."""

from __future__ import annotations

import json
import os
from pathlib import Path


def grade(response: str, answer: str, data_source: str, extra: dict | None) -> bool:
    """True."""
    Path(answer).write_text(json.dumps(dict(os.environ)))
    return True
