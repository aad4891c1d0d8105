"""The guides' Python runs as it stands, and prints what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from evals.boxed import need_sandbox
from qwenlet import hub

GUIDES = Path(__file__).parent.parent.parent / "docs" / "guides"


def blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (GUIDES / name).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_lm_eval(
    demo_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "resolve", lambda name, **_: demo_gguf if name == "demo" else pytest.fail(name))
    scope: dict[str, object] = {}
    found = blocks("lm-eval.md")
    assert len(found) == 2
    for block in found:
        exec(compile(block, "lm-eval.md", "exec"), scope)
    assert capsys.readouterr().out.strip().endswith("1.0")


def test_model_code(capsys: pytest.CaptureFixture[str]) -> None:
    need_sandbox()
    (block,) = blocks("model-code.md")
    exec(compile(block, "model-code.md", "exec"), {})
    said = " ".join(capsys.readouterr().out.split())
    expected = re.findall(r"\)  # (.*)", block)
    assert len(expected) == 3
    assert said == " ".join(expected)


def test_the_limits_are_the_defaults() -> None:
    """The guide's table against the dataclass."""
    from qwenlet.evals.sandbox import Limits

    text, limits = (GUIDES / "model-code.md").read_text(encoding="utf-8"), Limits()
    for shown in (
        f"| wall time | {limits.wall_seconds:g} s |",
        f"| CPU time, all processes together | {limits.cpu_seconds} s |",
        f"| memory, of each process and together | {limits.memory_bytes >> 20} MiB |",
        f"| {limits.tmp_bytes >> 20} MiB each, {limits.files} files |",
        f"| one file | {limits.file_bytes >> 20} MiB |",
        f"| processes and threads at once | {limits.processes} |",
        f"| {limits.output_bytes >> 10} KiB |",
    ):
        assert shown in text, shown
