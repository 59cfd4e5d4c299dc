"""A real browser: the Chromium of the system, without a window, driven by Playwright; and the page that it looks at."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest


def why_no_browser() -> str | None:
    if find_spec("playwright") is None:
        return "needs playwright (pip install -e .[dev])"
    if shutil.which("chromium") is None:
        return "needs Chromium (apt-get install chromium)"
    return None


@contextmanager
def chromium() -> Iterator[Any]:
    """A Playwright browser; skips where there is none. Nothing else in this thread may use asyncio meanwhile."""
    if reason := why_no_browser():
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    # as root its sandbox cannot be had
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """The address of ``app``, which answers from a thread of this process."""
    import uvicorn

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join(20)
