"""A headless Chromium for the tests of pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def open_browser() -> Iterator[Any]:
    """A Chromium of playwright; skips the test where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def open_page(browser: Any, path: Path, **context: Any) -> Iterator[Any]:
    """A page of a file. Any request for another address, and any error in the console, fails."""
    with browser.new_context(**context) as opened:
        page = opened.new_page()
        problems: list[str] = []
        address = path.resolve().as_uri()

        def route(request: Any) -> None:
            if request.request.url == address:
                request.continue_()
            else:
                problems.append(f"request: {request.request.url}")
                request.abort()

        page.route("**/*", route)
        page.on("request", lambda r: None)
        page.on("console", lambda m: m.type in ("error", "warning") and problems.append(m.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        yield page
        assert problems == []
