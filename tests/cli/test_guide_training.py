"""docs/guides/training.md as it stands: its commands run, on models and data small enough for a test."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from tests.train.tiny import TINY

from qwenlet.checkpoint import Checkpoint, write_random
from qwenlet.cli.completion import verbs

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "training.md").read_text(encoding="utf-8")
BLOCKS = "\n".join(re.findall(r"```\n(.*?)```", GUIDE, re.DOTALL)).replace("\\\n", " ")
COMMANDS = re.findall(r"qwenlet ((?:finetune|pretrain) [^\n#]*)", BLOCKS)
WHOLE = [command for command in COMMANDS if "..." not in command and "MODEL" not in command]


@pytest.fixture
def folder(tmp_path: Path, qwen_vocab: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the commands name, small."""
    monkeypatch.chdir(tmp_path)
    shape = replace(TINY, vocab_size=151_936, hidden_size=64, head_dim=32, intermediate_size=128)
    write_random(tmp_path / "model", shape, dtype="fp32", tokenizer_file=qwen_vocab)
    (tmp_path / "qwen.tiktoken").symlink_to(qwen_vocab)
    lines = [{"instruction": f"Count to {n}", "output": " ".join(map(str, range(1, n + 1)))} for n in range(1, 9)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n}?", "chosen": "yes", "rejected": "no"}) + "\n" for n in range(8))
    )
    tales = [f"Once upon a time there were {count} owls. They had red hats." for count in range(60)]
    (tmp_path / "stories.txt").write_text("\n<|endoftext|>\n".join(tales), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_exists(command: str):
    words = shlex.split(command)
    (verb,) = (verb for verb in verbs() if verb.words == (words[0],))
    names = {name for option in verb.options for name in option.names}
    assert {word for word in words if re.fullmatch(r"--?[a-z].*", word)} <= names


@pytest.mark.parametrize("command", [command for command in WHOLE if command.startswith("finetune")])
def test_finetuning(run, folder: Path, command: str):
    """As far as the plan; tests of the verb itself go to the end."""
    words = shlex.split(command)
    words[1] = str(folder / "model")
    result = run(*words, "--max-length", "64", *([] if "--preview" in words else ["--dry-run"]))
    assert result.code == 0, result.err
    if "--preview" in words:
        assert result.out.count("learned") == 3
        assert "[[1 2" in result.out
    else:
        assert "parameters learn" in result.err
    assert not (folder / "mine" / "training").exists()


def test_pretraining(run, folder: Path):
    (command,) = (command for command in WHOLE if command.startswith("pretrain"))
    result = run(*shlex.split(command), "--max-steps", "2", "--dtype", "fp32")
    assert result.code == 0, result.err
    assert "held-out loss" in result.err
    assert "of single tokens" in result.err
    assert "Once upon a time" in result.err
    made = Checkpoint.open(folder / "tiny").config
    assert (made.model_type, made.num_hidden_layers, made.tie_word_embeddings) == ("qwen", 4, True)
