"""Hosts for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from rig import Host, Rig, missing_reason


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Two hosts, h1 and h2. Skips, with the reason, where they cannot be made."""
    if reason := missing_reason():
        pytest.skip(reason)
    with Rig(2) as rig:
        yield rig.hosts
