"""Every command, on a session with the fake model: what it does, and what it says when it can't."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cli.fake import SYSTEM, FakeLLM
from qwenlet.cli import repl, slash
from qwenlet.cli.conversation import CHAT_PARAMS, Conversation, Exchange, State
from qwenlet.cli.session import Session
from qwenlet.config import SamplingParams


@pytest.fixture
def session():
    return Session(FakeLLM(), Conversation("fake", State(SYSTEM, SamplingParams())))


@pytest.fixture
def say(session, capsys):
    """Gives the session a line and returns what it showed: (stdout, stderr)."""

    def call(line):
        repl.handle(session, line)
        return capsys.readouterr()

    return call


def exchanges(session):
    return [(e.user, e.assistant, e.finish_reason) for e in session.conversation.exchanges]


def test_a_question_is_kept_with_its_reply(session, say):
    assert say("hi").out == "You said hi (101)\n"
    say("again")
    messages, _ = session.llm.requests[-1]
    assert [m["content"] for m in messages] == [SYSTEM, "hi", "You said hi (101)", "again"]


def test_a_doubled_slash_is_text(session, say):
    assert say("//etc").out == "You said /etc (101)\n"


def test_a_reply_that_was_cut_is_marked(session, say):
    assert "[cut" in say("cut").err
    assert exchanges(session) == [("cut", "You said cut (101)", "length")]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("nothing", "the question is not part of the conversation"),
        ("too long", "error: the prompt has 100"),
        ("broken", "error: this should"),
    ],
)
def test_a_question_without_a_reply_is_not_kept(session, say, line, expected):
    say("hi")
    assert expected in say(line).err
    assert [e[0] for e in exchanges(session)] == ["hi"]


def test_help_lists_every_command(say):
    text = say("/help").err
    assert all(f"  /{name}" in text for name in slash.COMMANDS)


def test_unknown_commands_name_the_nearest(say):
    assert "error: there is no command /histroy\nhint: did you mean /history?" in say("/histroy").err
    assert "hint: /help lists the commands" in say("/zzz").err
    assert "/undo takes no argument" in say("/undo 3").err


def test_exit(session, say):
    say("/exit")
    assert session.finished


def test_clear_and_undo(session, say):
    say("hi")
    say("/clear")
    assert exchanges(session) == []
    assert "undone: /clear; 1 exchange" in say("/undo").err
    assert "undone: the last exchange; 0 exchanges" in say("/undo").err
    assert "error: there is nothing to undo" in say("/undo").err


def test_system(session, say):
    assert say("/system").err == f"system prompt: {SYSTEM}\n"
    say("/system Talk like a pirate.")
    say("hi")
    assert session.llm.requests[-1][0][0] == {"role": "system", "content": "Talk like a pirate."}
    assert say('/system ""').err == "system prompt: (none)\n"
    say("hi")
    assert session.llm.requests[-1][0][0]["role"] == "user"


def test_history_shows_marks_and_no_control_characters(session, say):
    assert "nothing has been said" in say("/history").err
    say("escape")
    state = session.conversation.state
    session.conversation.state = replace(state, exchanges=(*state.exchanges, Exchange("b", "half", "cancelled")))
    assert say("/history").err == "1 you> escape\n[31mred\n\tend\n2 you> b\nhalf\n[stopped]\n"


def test_regen_draws_again_and_undo_brings_the_old_reply_back(session, say):
    assert "there is no reply to draw again" in say("/regen").err
    say("hi")
    shown = say("/regen")
    assert shown.out == "You said hi (102)\n"
    assert "seed 102 for this reply" in shown.err
    messages, _ = session.llm.requests[-1]
    assert [m["role"] for m in messages] == ["system", "user"]
    assert exchanges(session) == [("hi", "You said hi (102)", "stop")]
    say("/undo")
    assert exchanges(session) == [("hi", "You said hi (101)", "stop")]


def test_regen_leaves_a_fixed_seed_for_this_once(session, say):
    say("/seed 5")
    assert say("hi").out == "You said hi (5)\n"
    assert say("/regen").out == "You said hi (101)\n"
    assert say("/regen 7").out == "You said hi (7)\n"
    assert say("more").out == "You said more (5)\n"


def test_regen_that_fails_keeps_the_reply(session, say, monkeypatch):
    say("hi")
    before = session.conversation.state

    def fail(messages, params):
        raise RuntimeError("the bug")

    monkeypatch.setattr(session.llm, "reply", fail)
    assert "the bug" in say("/regen").err
    assert session.conversation.state == before


def test_regen_of_a_greedy_reply_warns(say):
    say("hi")
    say("/set temperature 0")
    assert "the reply will be the same" in say("/regen").err


def test_seed(session, say):
    assert say("/seed").err == "seed: drawn for each reply\n"
    assert say("/seed 5").err == "seed: 5 for every reply\n"
    assert "expected a whole number" in say("/seed five").err
    assert "seed is 18446744073709551616" in say("/seed 18446744073709551616").err
    assert say("/seed random").err == "seed: drawn for each reply\n"


def test_set(session, say):
    assert say("/set temperature 0.5").err == "temperature = 0.5\n"
    assert "temperature is -1, expected" in say("/set temperature -1").err
    assert "temperature is 'hot', expected" in say("/set temperature hot").err
    assert "temperature is nan" in say("/set temperature NaN").err
    assert session.conversation.params.temperature == 0.5
    assert "hint: did you mean top_p?" in say("/set topp 1").err
    assert "needs a name and a value" in say("/set temperature").err
    assert say('/set stop ["###"]').err == "stop = '###'\n"
    assert say("/set max-new-tokens 5").err == "max_new_tokens = 5\n"
    say("hi")
    assert session.llm.requests[-1][1] == SamplingParams(temperature=0.5, stop=("###",), max_new_tokens=5)
    assert say("/set temperature default").err == "temperature = 1.0  (the checkpoint's own)\n"


def test_show(session, say):
    say("hi")
    lines = say("/show").err.splitlines()
    assert lines[0] == "fake: int4 on cpu, context of 64 tokens"
    assert "top_p = 0.8  (the checkpoint's own)" in lines
    assert "seed = drawn for each reply" in lines
    assert lines[-1] == "seed of the last reply: 101"
    assert all(any(line.startswith(f"{name} = ") for line in lines) for name in CHAT_PARAMS)


def test_save_and_load(session, say, tmp_path):
    file = tmp_path / "my talk.json"
    say("hi")
    assert "1 exchange" in say(f"/save '{file}'").err
    [saved] = json.loads(file.read_text())["conversations"]
    assert [message["content"] for message in saved["messages"]] == ["hi", "You said hi (101)"]
    say("/clear")
    session.conversation.model = "another"
    shown = say(f"/load '{file}'").err
    assert "1 exchange" in shown
    assert "it was held with fake; another goes on with it" in shown
    assert exchanges(session) == [("hi", "You said hi (101)", "stop")]
    assert "expected one file name" in say("/save").err
    assert "expected one file name" in say("/load a b").err
    assert "No closing quotation" in say("/load 'a").err
    assert "can't read" in say("/load nowhere.json").err
    assert len(exchanges(session)) == 1


def test_stats(session, say):
    assert "no reply yet" in say("/stats").err
    assert say("hi").err == ""
    assert "10 prompt tokens; 5 new" in say("/stats").err
    say("/stats on")
    assert "decode 10.0 tokens/s" in say("hi").err
    say("/stats off")
    assert say("hi").err == ""
    assert "on or off" in say("/stats maybe").err


def test_multiline(session, say):
    assert "Alt-Enter" in say("/multiline").err
    assert session.multiline
    assert say("/multiline").err == "Enter sends\n"


def test_bytes_that_are_no_text_are_refused(session, say):
    assert "the line is not valid UTF-8" in say("caf\udce9").err
    assert session.llm.requests == []
