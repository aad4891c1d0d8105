"""The web page in a browser, against real servers: what people do, what goes wrong, how it looks, how quick it is.

The checks themselves are in page/checks.mjs. QWENLET_TEST_SHOTS=docs/images also takes the pictures of the docs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from server.conftest import Server, running

ROOT = Path(__file__).parents[2]
PAGE = Path(__file__).parent / "page"
CHECKS = re.findall(r"^checks\.(\w+) = async", (PAGE / "checks.mjs").read_text(encoding="utf-8"), re.MULTILINE)
ON_SMALL = ("context_full", "queue_full", "without_history")
ON_OWN = ("server_goes_away",)


def _missing() -> str | None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if shutil.which("node") is None or chromium is None:
        return "needs node and a browser: apt-get install nodejs npm chromium fonts-noto-cjk"
    if not (ROOT / "web" / "node_modules" / "playwright-core").is_dir():
        return "needs the page's packages: scripts/page"
    return None


pytestmark = [
    pytest.mark.page,
    pytest.mark.skipif(_missing() is not None, reason=str(_missing())),
]


class Browser:
    """The worker, which keeps one browser for all checks."""

    def __init__(self) -> None:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        self._process = subprocess.Popen(
            ["node", PAGE / "worker.mjs"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"CHROMIUM": str(chromium)},
        )

    def check(self, name: str, url: str, **asked: Callable[[], Any]) -> Any:
        """Runs one check; what it asks for meanwhile is in `asked`. Gives what it measured, in words."""
        shots = os.environ.get("QWENLET_TEST_SHOTS")
        self._write({"check": name, "url": url, "shots": None if shots is None else str(Path(shots).resolve())})
        while True:
            told = self._read()
            if "ask" not in told:
                break
            self._write(asked[told["ask"]]())
        if "error" in told:
            pytest.fail(told["error"], pytrace=False)
        return told["ok"]

    def _write(self, data: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(data) + "\n")
        self._process.stdin.flush()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the browser's worker ended"
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    one = Browser()
    yield one
    one.close()


@pytest.fixture(scope="session")
def small(demo_gguf: Path) -> Iterator[Server]:
    """A server with hardly any room, which asks for a key and remembers nothing."""
    options = ("--max-context", "512", "--max-requests", "1", "--max-queue", "0", "--no-history", "--api-key", "secret")
    with running(demo_gguf, "--quiet", *options) as one:
        yield one


@pytest.mark.parametrize("check", [each for each in CHECKS if each not in (*ON_SMALL, *ON_OWN)])
def test_page(check: str, browser: Browser, server: Server, record_property: Callable[[str, object], None]) -> None:
    said = browser.check(check, f"http://127.0.0.1:{server.port}")
    record_property("measured", said)
    print(said or "")


@pytest.mark.parametrize("check", ON_SMALL)
def test_page_with_little_room(check: str, browser: Browser, small: Server) -> None:
    browser.check(check, f"http://127.0.0.1:{small.port}")


def test_page_outlives_the_server(
    browser: Browser, demo_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWENLET_DATA", str(tmp_path))
    with running(demo_gguf, "--quiet") as first:
        again = ExitStack()

        def kill() -> bool:
            first.process.kill()
            first.process.wait()
            return True

        def restart() -> bool:
            again.enter_context(running(demo_gguf, "--quiet", "--port", str(first.port)))
            return True

        with again:
            browser.check("server_goes_away", f"http://127.0.0.1:{first.port}", kill=kill, restart=restart)
