"""Pages are opened in a Chromium: the one that is installed, or the one `./run test-page` gets."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fidelity.browser import Browser

ROOT = Path(__file__).parents[2]


def find_browser() -> Path | None:
    if named := os.environ.get("MOEQ_BROWSER"):
        return Path(named)
    for name in ("chromium", "chromium-headless-shell", "google-chrome"):
        if found := shutil.which(name):
            return Path(found)
    own = ROOT / ".browser"
    return own / "chromium" if (own / ".installed").exists() else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if find_browser() is None:
        reason = "no Chromium: ./run test-page gets one, or set MOEQ_BROWSER"
        for item in items:
            if item.get_closest_marker("browser"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    assert program is not None
    browser = Browser(program, tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()
