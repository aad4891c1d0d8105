"""Bars for whatever takes long: on a terminal, in its colours, and never in a pipe."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pexpect
import pytest
from tests.train.tiny import TINY

from evals import folders
from qwenlet.checkpoint import write_random

# The bar comes after half a second, which these small jobs don't take: here it comes at once.
AT_ONCE = """
import sys
from qwenlet.cli import console, main
made = console.Progress.__init__
console.Progress.__init__ = lambda self, unit="bytes", delay=0.0: made(self, unit, 0.0)
sys.exit(main(sys.argv[1:]))
"""
VERBS = ["load", "prefill", "quantize", "finetune", "pretrain", "eval"]
BAR = "━"
COLOUR = re.compile(r"\x1b\[[0-9;]*(?:3[0-8]|9[0-7])[;m]")
ESCAPE = "\x1b"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, qwen_vocab: Path) -> Path:
    """A small model, and something for each verb to work on."""
    root = tmp_path_factory.mktemp("progress")
    shape = replace(TINY, vocab_size=151_936, intermediate_size=64, max_position_embeddings=2048, seq_length=2048)
    write_random(root / "model", shape, dtype="fp32", tokenizer_file=qwen_vocab)
    examples = [{"instruction": f"Count to {n}", "output": " ".join(map(str, range(n)))} for n in range(1, 13)]
    (root / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in examples), encoding="utf-8")
    (root / "text.txt").write_text("\n<|endoftext|>\n".join(f"The {n} foxes sleep." for n in range(40)), "utf-8")
    folders.mmlu(root / "data", questions=1)
    return root


def command(work: Path, out: Path, verb: str, vocabulary: Path) -> list[str]:
    model, steps = str(work / "model"), "--epochs 1 --accumulation 1 --batch-size 4 --dtype fp32".split()
    return {
        "load": ["generate", model, "--prompt", "a", "--max-new-tokens", "1"],
        "prefill": ["chat", model, "--prompt", "word " * 1500, "--max-new-tokens", "1", "--no-history"],
        "quantize": ["quantize", model, str(out), "--method", "rtn", "--group-size", "32", "--no-report"],
        "finetune": ["finetune", model, str(work / "data.jsonl"), "--out", str(out), "--max-length", "64", *steps],
        "pretrain": [
            "pretrain", str(work / "text.txt"), "--out", str(out), "--tokenizer", str(vocabulary), "--vocabulary",
            "512", "--layers", "1", "--hidden", "32", "--heads", "2", "--inner", "48", "--length", "32", *steps,
        ],
        "eval": [
            "eval", "mmlu", "--model", model, "--data-dir", str(work / "data"), "--out", str(out), "--limit", "4",
            "--unchecked-data",
        ],
    }[verb]  # fmt: skip


SAID = {
    "load": r"\d+(\.\d+)?/\d+(\.\d+)? [kM]?B", "prefill": "reading the prompt", "quantize": "%", "finetune": "%",
    "pretrain": "%", "eval": r"mmlu.*%",
}  # fmt: skip


def on_a_terminal(arguments: list[str], **environment: str) -> str:
    """What a person is shown."""
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "160", "NO_COLOR": ""} | environment
    child = pexpect.spawn(
        sys.executable, ["-c", AT_ONCE, *arguments], env=env, encoding="utf-8", timeout=120, dimensions=(40, 160)
    )
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0, child.before
    return str(child.before)


@pytest.mark.parametrize("verb", VERBS)
def test_a_terminal_is_shown_a_bar(work: Path, tmp_path: Path, qwen_vocab: Path, verb: str) -> None:
    """Where no colour is wanted, there is none in it."""
    shown = on_a_terminal(command(work, tmp_path / "out", verb, qwen_vocab), NO_COLOR="1")
    bars = [line for line in re.split(r"[\r\n]", shown) if BAR in line]
    assert any(re.search(SAID[verb], line) for line in bars), shown
    assert not COLOUR.search(shown)


def test_bars_have_colours(work: Path, tmp_path: Path, qwen_vocab: Path) -> None:
    shown = on_a_terminal(command(work, tmp_path / "out", "load", qwen_vocab))
    assert BAR in shown
    assert COLOUR.search(shown)


@pytest.mark.parametrize("verb", VERBS)
def test_a_pipe_is_not(work: Path, tmp_path: Path, qwen_vocab: Path, verb: str) -> None:
    arguments = command(work, tmp_path / "out", verb, qwen_vocab)
    env = os.environ | {"TERM": "xterm-256color", "NO_COLOR": ""}
    piped = subprocess.run([sys.executable, "-c", AT_ONCE, *arguments], capture_output=True, text=True, env=env)
    assert piped.returncode == 0, piped.stderr
    for said in (piped.stdout, piped.stderr):
        assert BAR not in said
        assert ESCAPE not in said
        assert "\r" not in said
