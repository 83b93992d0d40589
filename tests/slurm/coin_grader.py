"""Calls about half of the answers right, by their text alone: a random model then has groups to train on."""

from __future__ import annotations

import zlib


def grade(response: str, answer: str, data_source: str = "", extra: dict | None = None) -> bool:
    return zlib.crc32(response.encode()) % 2 == 0
