"""What holds for all tests: a failure is a failure, except in a test that is marked `flaky` with a reason."""

from __future__ import annotations

import pytest
from _pytest.runner import runtestprotocol


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """A test marked `@pytest.mark.flaky("reason")` that fails is tried once more; the first failure is printed."""
    mark = item.get_closest_marker("flaky")
    if mark is None:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, nextitem=nextitem, log=False)
    failed = [report for report in reports if report.failed]
    if failed:
        print(f"\n{item.nodeid} failed and is tried once more ({mark.args[0]}):\n{failed[0].longreprtext}")
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True
