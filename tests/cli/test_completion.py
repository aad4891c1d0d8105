"""The scripts of `qwenlet completion`, run by the shells themselves."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

from qwenlet.cli import VERBS
from qwenlet.cli.completion import verbs


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The path of a shell's script."""

    @functools.cache
    def make(shell: str) -> Path:
        path = tmp_path_factory.mktemp("completion") / f"qwenlet.{shell}"
        done = subprocess.run(
            [sys.executable, "-m", "qwenlet", "completion", shell], capture_output=True, text=True, check=True
        )
        path.write_text(done.stdout)
        return path

    return make


@pytest.fixture
def on_path(tmp_path) -> dict[str, str]:
    """An environment with a `qwenlet` that lists two conversations."""
    fake = tmp_path / "bin" / "qwenlet"
    fake.parent.mkdir()
    fake.write_text(
        "#!/bin/sh\n"
        "echo 'ab12cd34  2026-11-25 10:00  demo  What is rain?'\n"
        "echo 'ff00ff00  2026-11-25 09:00  demo  Snow: why'\n"
    )
    fake.chmod(0o755)
    return os.environ | {"PATH": f"{fake.parent}:{os.environ['PATH']}", "LC_ALL": "C.UTF-8"}


CASES = [
    ("qwenlet hi", ["history"]),
    ("qwenlet history re", ["rename"]),
    ("qwenlet chat --con", ["--continue"]),
    ("qwenlet chat --kv-cache b", ["bf16"]),
    ("qwenlet history export --to m", ["markdown"]),
    ("qwenlet history show a", ["ab12cd34"]),
    ("qwenlet chat --resume f", ["ff00ff00"]),
    ("qwenlet vocab extend --sta", ["--start-id"]),
    ("qwenlet completion f", ["fish"]),
]


def test_every_verb_is_there():
    assert {verb.words[0] for verb in verbs()} == set(VERBS)
    assert {"list", "search", "show", "rm"} <= {
        verb.words[1] for verb in verbs() if verb.words[0] == "history" and verb.words[1:]
    }


@pytest.mark.parametrize(("typed", "expected"), [*CASES, ("qwenlet chat --kv-cache=fp3", ["fp32"])])
def test_bash(script, on_path, typed, expected):
    words = typed.replace("=", " = ").split(" ")  # as bash cuts them
    program = (
        'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _qwenlet; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", program, "bash", script("bash"), *words], capture_output=True, text=True, env=on_path
    )
    assert (done.stdout.split(), done.stderr) == (expected, "")


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
@pytest.mark.parametrize(("typed", "expected"), CASES)
def test_fish(script, on_path, tmp_path, typed, expected):
    env = on_path | {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    program = 'source $argv[1]; complete -C "$argv[2]"'
    done = subprocess.run(["fish", "-c", program, script("fish"), typed], capture_output=True, text=True, env=env)
    assert ([line.split("\t")[0] for line in done.stdout.splitlines()], done.stderr) == (expected, "")


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh(script, on_path, tmp_path):
    env = on_path | {"HOME": str(tmp_path), "ZDOTDIR": str(tmp_path), "TERM": "xterm"}
    shell = pexpect.spawn("zsh", ["-f", "-i"], env=env, encoding="utf-8", timeout=20, dimensions=(40, 200))
    shell.delaybeforesend = 0.1
    shell.sendline("PS1='READY'; autoload -Uz compinit; compinit -D; unsetopt zle_bracketed_paste prompt_sp")
    shell.sendline(f"source {script('zsh')}; echo LOA''DED")
    shell.expect_exact("LOADED")
    try:
        for typed, (expected,) in CASES:
            shell.send(f"{typed}\t")
            shell.send("\x01print -r -- 'GOT '\x05\r")  # at the beginning of the line: what it has become
            shell.expect(r"GOT  ?(qwenlet[^\r\n]*)\r\n")
            assert shell.match[1].split()[-1] == expected, typed
    finally:
        shell.close(force=True)
