"""`qwenlet chat --tools FILE`: calls are asked about, run, said back, kept, and end."""

from __future__ import annotations

import json

import pytest

from qwenlet.cli import console
from qwenlet.cli.calls import REFUSED
from qwenlet.cli.reply import Reply
from qwenlet.cli.session import Session
from qwenlet.store import Store
from qwenlet.tools import Call

TOOLS = '''
def clock(zone: str = "UTC") -> str:
    """The time."""
    return f"noon in {zone}"

def broken() -> str:
    raise ValueError("the bug")
'''


@pytest.fixture
def tools(tmp_path) -> str:
    (tmp_path / "tools.py").write_text(TOOLS)
    return str(tmp_path / "tools.py")


@pytest.fixture
def answers(monkeypatch):
    """What the user says when asked."""
    given: list[str] = []
    asked: list[str] = []

    def ask(question: str) -> str:
        asked.append(question)
        answer = given.pop(0)
        if answer == "^C":
            raise KeyboardInterrupt
        return answer + "\n"

    monkeypatch.setattr(console, "ask", ask)
    return given, asked


def results(api) -> list[str]:
    messages, _ = api.llm.requests[-1]
    return [message["content"] for message in messages if message["role"] == "tool"]


def test_a_call_is_asked_about_run_and_answered(run, api, tools, answers):
    answers[0].append("y")
    result = run("chat", "--tools", tools, "-p", 'clock {"zone": "Rome"}')
    assert (result.code, result.out) == (0, "It is noon in Rome.\n")
    assert result.err == 'thought: I call.\ncall clock({"zone": "Rome"})\nresult: noon in Rome\n'
    assert answers[1] == ["run it? [y]es, [n]o, [a]lways clock: "]
    assert [tool.name for tool in api.llm.toolboxes[0].offered] == ["clock", "broken"]
    calling, said = api.llm.requests[-1][0][-2:]
    assert calling["tool_calls"][0]["function"] == {"name": "clock", "arguments": '{"zone": "Rome"}'}
    assert (calling["reasoning_content"], said["tool_call_id"]) == ("I call.", calling["tool_calls"][0]["id"])


def test_no_is_told_to_the_model(run, api, tools, answers):
    answers[0].extend(["what?", "n"])
    assert run("chat", "--tools", tools, "-p", "clock {}").out == f"It is {REFUSED}.\n"
    assert len(answers[1]) == 2, "what is neither is asked again"


def test_always_is_asked_once_and_calls_end(run, api, tools, answers):
    answers[0].append("a")
    result = run("chat", "--tools", tools, "--max-calls", "3", "-p", "always clock {}")
    assert results(api) == ["noon in UTC"] * 3
    assert len(answers[1]) == 1
    assert "3 calls for one question are enough" in result.err
    assert result.out == "It is noon in UTC.\n"
    assert not api.llm.toolboxes[-1]


def test_calls_may_run_without_asking(run, api, tools):
    result = run("chat", "--tools", tools, "--allow-calls", "-p", "broken {}", "--json", stdin=b"")
    answer = json.loads(result.out)
    assert answer["reply"] == "It is Error: ValueError: the bug."
    assert answer["steps"][1]["content"] == "Error: ValueError: the bug"
    refused = run("chat", "--tools", tools, "-p", "x", stdin=b"")
    assert refused.err.startswith("error: the tools' calls are asked about, and stdin is no terminal")


def test_ctrl_c_at_the_question_ends_the_reply(run, api, tools, answers):
    answers[0].append("^C")
    result = run("chat", "--tools", tools, "-p", "clock {}")
    assert (result.code, result.out) == (130, "")
    assert len(api.llm.requests) == 1


def test_a_call_that_ctrl_c_cuts_off_is_not_run(run, tools, monkeypatch):
    half = Reply("", "cancelled", None, (Call("call_1", "clock", '{"zo'),))
    monkeypatch.setattr(Session, "_turn", lambda *_: half)
    result = run("chat", "--tools", tools, "--allow-calls", "-p", "clock {}")
    assert (result.code, result.out) == (130, "")
    assert "call clock" not in result.err


def test_calls_are_kept_and_gone_on_with(run, api, tools):
    run("chat", "--tools", tools, "--allow-calls", "-p", "clock {}")
    with Store.open() as store:
        (talk,) = store.conversations()
        assert [message.role for message in store.path(talk.id)] == ["user", "assistant", "tool", "assistant"]
    shown = run("history", "show", talk.short_id).out
    assert "assistant, calling clock> " in shown
    # without tools: what was called is told all the same, and a reply in that format is still read
    assert run("chat", "-c", "-p", "thanks").out == "You said thanks.\n"
    assert [message["role"] for message in api.llm.requests[-1][0]] == [
        "system", "user", "assistant", "tool", "assistant", "user",
    ]  # fmt: skip


def test_a_text_that_calls_nothing_is_a_reply(run, tools):
    assert run("chat", "--tools", tools, "-p", "hello there").out == "You said hello there.\n"


def test_a_bad_file_is_refused_before_the_model_is_loaded(run, api, tmp_path):
    (tmp_path / "bad.py").write_text("def f(x): ...")
    result = run("chat", "--tools", str(tmp_path / "bad.py"), "-p", "x")
    assert "the parameter x of f has no type hint" in result.err
    assert api.loaded == []
