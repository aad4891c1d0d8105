"""The conversation on a real terminal: typing, streaming, Ctrl-C, Ctrl-D, history. The model is the fake one."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pexpect
import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from qwenlet.cli.repl import SlashCompleter

TESTS = Path(__file__).parent.parent
PROMPT = "you> "
CTRL_C, CTRL_D = "\x03", "\x04"


@pytest.fixture
def chat(tmp_path):
    """Starts `qwenlet chat` on a terminal of its own and ends it."""
    children = []

    def start(*arguments: str) -> pexpect.spawn:
        environment = os.environ | {"QWENLET_DATA": str(tmp_path / "qwenlet"), "NO_COLOR": "1", "TERM": "dumb"}
        child = pexpect.spawn(
            sys.executable,
            ["-m", "cli.fake", "chat", *arguments],
            cwd=TESTS,
            env=environment,
            encoding="utf-8",
            timeout=30,
            dimensions=(40, 120),
        )
        child.delaybeforesend = 0.1
        children.append(child)
        return child

    yield start
    for child in children:
        child.close(force=True)


def ended(child: pexpect.spawn) -> int:
    child.expect(pexpect.EOF)
    child.close()
    assert child.signalstatus is None
    return child.exitstatus


def test_a_conversation(chat, tmp_path):
    child = chat()
    child.expect_exact("fake: float32 on cpu, context of 64 tokens")
    child.expect_exact("This is the demo model: SmolLM2, 135 million parameters, English.")
    child.expect_exact("qwenlet chat Qwen/Qwen-1_8B-Chat")
    child.expect_exact(PROMPT)

    child.sendline("hello")
    child.expect_exact("You said hello (101)")
    child.expect_exact(PROMPT)

    # Ctrl-C stops the reply, keeps what there is of it, and the conversation goes on
    child.sendline("slow")
    child.expect_exact("word word word")
    child.send(CTRL_C)
    child.expect_exact("[stopped]")
    child.expect_exact(PROMPT)
    child.sendline("/history")
    child.expect_exact("You said hello (101)")
    child.expect_exact("word word word")
    child.expect_exact("[stopped]")
    child.expect_exact(PROMPT)

    # at the prompt it clears the line: what was typed is not sent
    child.send("never sent")
    child.send(CTRL_C)
    child.expect_exact(PROMPT)

    child.sendline("/set temperature -1")
    child.expect_exact("error: temperature is -1")
    child.expect_exact(PROMPT)
    child.sendline("/histroy")
    child.expect_exact("did you mean /history?")
    child.expect_exact(PROMPT)

    file = tmp_path / "talk.json"
    child.sendline(f"/save {file}")
    child.expect_exact("2 exchanges in the conversation")
    child.expect_exact(PROMPT)
    child.send(CTRL_D)
    assert ended(child) == 0
    assert '"finish_reason": "cancelled"' in file.read_text()
    assert "never sent" not in file.read_text()

    history = tmp_path / "qwenlet" / "chat-history"
    assert "+hello\n" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_multiline_loading_and_no_history(chat, tmp_path):
    file = tmp_path / "talk.json"
    file.write_text(
        '{"version": 1, "model": "m", "system": "", "params": {}, "messages": '
        '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    )
    child = chat("--load", str(file), "--no-history", "--stats")
    child.expect_exact("/history shows")
    child.expect_exact(PROMPT)
    child.sendline("/multiline")
    child.expect_exact("Alt-Enter")
    child.expect_exact(PROMPT)
    child.send("one\rtwo\x1b\r")
    child.expect(r"You said one\s+two \(101\)")
    child.expect_exact("decode 10.0 tokens/s")
    child.expect_exact(PROMPT)
    child.send("/exit\x1b\r")
    assert ended(child) == 0
    assert not (tmp_path / "qwenlet").exists()


def test_ctrl_c_ends_a_single_answer_with_130(chat):
    child = chat("-p", "slow")
    child.expect_exact("word word")
    child.send(CTRL_C)
    assert ended(child) == 130
    assert "Traceback" not in child.before


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("/hi", ["/history"]),
        ("/se", ["/seed", "/set"]),
        ("/set top", ["top_p", "top_k"]),
        ("/stats o", ["on", "off"]),
        ("hello /hi", []),
        ("//hi", []),
    ],
)
def test_completion(typed, expected):
    found = SlashCompleter().get_completions(Document(typed), CompleteEvent())
    assert [completion.text for completion in found] == expected


def test_completion_of_files(tmp_path):
    (tmp_path / "talk.json").touch()
    found = SlashCompleter().get_completions(Document(f"/load {tmp_path}/ta"), CompleteEvent())
    assert [completion.text for completion in found] == ["lk.json"]
