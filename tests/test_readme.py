"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qwenlet import hub

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_there_is_something_to_run() -> None:
    assert BLOCKS


@pytest.mark.parametrize("block", BLOCKS)
def test_python_block(
    block: str, demo_gguf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub, "resolve", lambda name, **_: demo_gguf if name == "demo" else pytest.fail(name))
    scope: dict[str, object] = {}
    exec(compile(block, str(README), "exec"), scope)
    history = scope["history"]
    assert isinstance(history, list)
    assert "Paris" in history[0][1]
    assert len(history) == 2
    assert len(capsys.readouterr().out.split()) > 20
