"""`run` calls the command line in this process, with the fake model behind it, and collects what it says."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import qwenlet
from cli.fake import FakeApi
from qwenlet.cli import main


@dataclass
class Result:
    code: int
    out: str
    err: str


class Stdin(io.TextIOWrapper):
    """Bytes as a pipe would bring them, or a terminal where there are none."""

    def __init__(self, data: bytes | None) -> None:
        super().__init__(io.BytesIO(data or b""))
        self.terminal = data is None

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    fake = FakeApi()
    monkeypatch.setitem(sys.modules, "qwenlet.api", fake)
    monkeypatch.setattr(qwenlet, "api", fake, raising=False)  # an earlier test may have imported the real one
    return fake


@pytest.fixture
def run(
    api: FakeApi, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes], tmp_path: Path
) -> Callable[..., Result]:
    monkeypatch.delenv("QWENLET_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("QWENLET_DATA", str(tmp_path / "data"))

    def call(*arguments: str, stdin: bytes | None = None) -> Result:
        monkeypatch.setattr(sys, "stdin", Stdin(stdin))
        code = main(arguments)
        out, err = capfdbinary.readouterr()
        return Result(code, out.decode(), err.decode())

    return call
