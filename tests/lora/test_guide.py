"""The guide's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lora.tiny import stir
from qwenlet.checkpoint import Checkpoint, load_model
from qwenlet.config import LoraConfig
from qwenlet.lora import add_lora, save_adapter

GUIDE = Path(__file__).parent.parent.parent / "docs" / "guides" / "adapters.md"


def test_the_guides_python_runs(
    demo_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = load_model(Checkpoint.open(demo_gguf), torch.float32, torch.device("cpu"))
    add_lora(model, LoraConfig(rank=4))
    stir(model)
    save_adapter(model, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(block.replace('"demo"', repr(str(demo_gguf))), str(GUIDE), "exec"), {})
    assert capsys.readouterr().out.strip()
