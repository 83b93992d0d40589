"""One browser tab for the tests of this folder; they are skipped where no Chromium can be had."""

import pytest
from chromium import Page, find_or_install


@pytest.fixture(scope="session")
def browser():
    executable, why_not = find_or_install()
    if executable is None:
        pytest.skip(why_not)
    page = Page(executable)
    yield page
    page.close()


@pytest.fixture
def page(browser):
    """The tab with its notes empty; a test that uses it fails where the page met an error or asked the network."""
    browser.requests.clear()
    browser.errors.clear()
    yield browser
    assert browser.errors == []
    assert [url for url in browser.requests if not url.startswith(("file:", "data:", "about:", "blob:"))] == []
