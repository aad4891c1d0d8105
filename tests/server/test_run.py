"""The end of a server that has no model yet."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time

import pytest

from server.conftest import Server

SLOW = """
import sys, time
from qwenlet import api
from qwenlet.cli import main

api.load = lambda *_, **__: time.sleep(600)
sys.exit(main(["serve", "demo", "--port", "0"]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_model_is_loaded_ends_the_server(number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", SLOW], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        match = re.search(r"http://[^ ]*:(\d+): loading demo", process.stderr.readline())
        assert match is not None
        server = Server(process, int(match.group(1)))
        assert server.call("GET", "/health").status == 503
        assert server.chat().error["code"] == "loading"
        process.send_signal(number)
        began = time.monotonic()
        assert process.wait(timeout=20) == 0
        assert time.monotonic() - began < 10.0
        assert "still being loaded" in process.stderr.read()
    finally:
        process.kill()
        process.communicate()
