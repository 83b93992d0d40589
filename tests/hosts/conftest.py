"""Hosts for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from rig import Host, Rig, need_hosts


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Two hosts, h1 and h2."""
    need_hosts()
    with Rig(2) as rig:
        yield rig.hosts
