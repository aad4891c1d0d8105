"""The conversation on a real terminal: typing, streaming, Ctrl-C, Ctrl-D, history. The model is the fake one."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from qwenlet.cli.repl import SlashCompleter

TESTS = Path(__file__).parent.parent
PROMPT = "you>"
CTRL_C, CTRL_D = "\x03", "\x04"


@pytest.fixture
def chat(tmp_path):
    """Starts `qwenlet chat` on a terminal of its own and ends it."""
    children = []

    def start(
        *arguments: str, dimensions: tuple[int, int] = (40, 120), encoding: str = "utf-8", **environment: str
    ) -> pexpect.spawn:
        quiet = {"NO_COLOR": "1", "TERM": "dumb", "PROMPT_TOOLKIT_NO_CPR": "1"}
        environment = os.environ | {"QWENLET_DATA": str(tmp_path / "qwenlet"), **quiet} | environment
        child = pexpect.spawn(
            sys.executable,
            ["-m", "cli.fake", "chat", *arguments],
            cwd=TESTS,
            env=environment,
            encoding=encoding,
            timeout=60,
            dimensions=dimensions,
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


def end_input(child: pexpect.spawn) -> None:
    """Ctrl-D until it is heard: a dumb terminal shows its prompt a moment before it listens to keys, and till then the
    system takes Ctrl-D for the end of a line that nobody reads."""
    for _ in range(60):
        child.send(CTRL_D)
        if child.expect([pexpect.EOF, pexpect.TIMEOUT], timeout=1) == 0:
            return


def test_a_conversation(chat, tmp_path):
    child = chat()
    child.expect_exact("fake: int4 on cpu, context of 64 tokens")
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
    end_input(child)
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


def say(child: pexpect.spawn, line: str, *expected: str) -> None:
    child.sendline(line)
    for text in expected:
        child.expect_exact(text)
    child.expect_exact(PROMPT)


def test_a_conversation_goes_on_another_day(chat, tmp_path):
    (tmp_path / "notes.txt").write_text("alpha")
    child = chat()
    child.expect_exact(PROMPT)
    say(child, "hello", "You said hello (101)")
    say(child, f"What is @{tmp_path}/notes.txt?", "attached", "You said What is", "alpha")
    say(child, "What is @nowhere.txt?", "error: there is no file nowhere.txt")
    say(child, "/undo", "1 exchange")
    say(child, "other", "You said other (103)")
    # /edit offers the old question; what is typed is added to it
    child.sendline("/edit 1")
    child.expect_exact("hello")
    child.expect_exact("edit>")
    child.sendline(" there")
    child.expect_exact("You said hello there (104)")
    child.expect_exact(PROMPT)
    child.sendline("/edit")
    child.expect_exact("hello there")
    child.expect_exact("edit>")
    child.send(CTRL_C)
    child.expect_exact("nothing was asked")
    child.expect_exact(PROMPT)
    say(child, "/branches", "1  4 messages", "2  4 messages  other", "* 3  2 messages  hello there")
    say(child, "/retry 7", "You said hello there (7)")
    say(child, "/title Greetings", "Greetings")
    child.sendline("/exit")
    assert ended(child) == 0

    child = chat("--continue")
    child.expect_exact("1 exchange loaded")
    child.expect_exact(PROMPT)
    say(child, "/history", "1 you> hello there", "You said hello there (7)")
    say(child, "/branches 2", "2 exchanges")
    say(child, "again", "You said again")
    end_input(child)
    assert ended(child) == 0
    listed = subprocess.run(
        [sys.executable, "-m", "qwenlet", "history", "list"], capture_output=True, text=True, check=True,
        env=os.environ | {"QWENLET_DATA": str(tmp_path / "qwenlet")},
    )  # fmt: skip
    assert listed.stdout.count("\n") == 1
    assert "Greetings" in listed.stdout


def test_a_terminal_that_is_killed_loses_no_question(chat):
    child = chat()
    child.expect_exact(PROMPT)
    say(child, "hello", "You said hello (101)")
    child.sendline("slow")
    child.expect_exact("word word word")
    child.kill(signal.SIGKILL)
    child.wait()
    child = chat("-c")
    child.expect_exact("1 exchange loaded")
    child.expect_exact("The last question has no reply yet; /retry asks it again.")
    child.expect_exact(PROMPT)
    child.sendline("/retry")
    child.expect_exact("word word")
    child.send(CTRL_C)
    child.expect_exact("[stopped]")
    child.expect_exact(PROMPT)
    say(child, "/history", "1 you> hello", "2 you> slow")


def test_calls_are_asked_about_on_the_terminal(chat, tmp_path):
    tools = tmp_path / "tools.py"
    tools.write_text("def clock(zone: str = 'UTC') -> str:\n    return 'noon in ' + zone\n")
    child = chat("--tools", str(tools))
    child.expect_exact(PROMPT)
    for answer, said in (("n", "did not allow"), ("y", "noon in UTC"), ("a", "noon in UTC")):
        child.sendline("clock {}")
        child.expect_exact("call clock({})")
        child.expect_exact("run it? [y]es, [n]o, [a]lways clock: ")
        child.sendline(answer)
        child.expect_exact("It is ")
        child.expect_exact(said)
        child.expect_exact(PROMPT)
    say(child, "clock {}", "call clock({})", "result: noon in UTC", "It is noon in UTC.")
    say(child, "/undo", "3 exchanges")
    end_input(child)
    assert ended(child) == 0


def test_a_paste_of_a_megabyte(chat):
    """The context is too small for it, and that is all that happens."""
    child = chat(TERM="xterm")
    child.expect_exact(PROMPT)
    child.delaybeforesend = None
    child.maxread = 1_000_000
    child.send("\x1b[200~")
    for _ in range(1000):
        child.send("x" * 999 + "\n")
        child.expect([pexpect.TIMEOUT, r".+"], timeout=0)  # what it draws meanwhile
    child.send("\x1b[201~\r")
    child.expect_exact("You said ", timeout=60)
    child.expect_exact("(101)", timeout=60)
    child.expect_exact(PROMPT)
    say(child, "hello", "(102)")


@pytest.mark.parametrize(
    "environment",
    [
        {"dimensions": (0, 0), "TERM": ""},
        {"dimensions": (2, 5), "TERM": "no-such-terminal"},
        {"encoding": "latin-1", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TERM": "xterm"},
    ],
)
def test_poor_terminals(chat, environment):
    """No size, a tiny one, no kind, no UTF-8: it is less pretty, and it works."""
    child = chat("--stats", **environment)
    child.expect("you>")
    child.sendline("chinese")
    child.expect_exact("??" if environment.get("encoding") else "你好")
    child.expect("finish\\s+reason\\s+stop" if "dimensions" not in environment else "stop")
    child.expect("you>")
    child.sendline("/exit")
    assert ended(child) == 0
    assert "Traceback" not in child.before


@pytest.mark.parametrize(("environment", "coloured"), [({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False)])
def test_colours_are_the_user_s_choice(chat, environment, coloured):
    child = chat(TERM="xterm-256color", **environment)
    child.expect_exact(PROMPT)
    shown = child.before
    child.sendline("/nonsense")
    child.expect_exact("there is no command")
    shown += child.before
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-7]m", shown)) == coloured
    child.expect_exact(PROMPT)
    child.sendline("/exit")
    assert ended(child) == 0


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
