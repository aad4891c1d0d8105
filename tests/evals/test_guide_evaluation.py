"""The guide's Python runs as it stands, and its commands and tasks exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qwenlet import hub
from qwenlet.evals import tasks

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "evaluation.md").read_text(encoding="utf-8")


def test_python(
    demo_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "resolve", lambda name, **_: demo_gguf)
    (block,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    exec(compile(block, "evaluation.md", "exec"), {})
    assert capsys.readouterr().out == "perplexity 2\n"
    assert (tmp_path / "run" / "samples" / "perplexity-story-txt.as-is.jsonl").exists()


def test_the_commands_name_tasks_that_exist() -> None:
    for command in re.findall(r"^qwenlet eval ([^-\n]*(?:-\w+[^-\n]*)*?) --model", GUIDE, re.MULTILINE):
        for name in command.split():
            assert name in tasks.TASKS
