"""The store follows the terminal: what is asked, undone, drawn again, edited; and what others do to it meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cli.fake import SYSTEM, FakeLLM
from qwenlet.cli import repl
from qwenlet.cli.conversation import Conversation, State
from qwenlet.cli.keeper import Keeper
from qwenlet.cli.saved import state_of
from qwenlet.cli.session import Session
from qwenlet.config import SamplingParams
from qwenlet.store import Store


@pytest.fixture
def store(tmp_path) -> Iterator[Store]:
    with Store.open(tmp_path / "history.sqlite3") as opened:
        yield opened


@pytest.fixture
def session(store):
    state = State(SYSTEM, SamplingParams())
    return Session(FakeLLM(), Conversation("fake", state), keeper=Keeper(store, "fake", SYSTEM))


@pytest.fixture
def say(session, capsys):
    def call(line):
        repl.handle(session, line)
        return capsys.readouterr()

    return call


def stored(store) -> list[str]:
    """The current branch of the only conversation."""
    (talk,) = store.conversations()
    return [message.content for message in store.path(talk.id)]


def same(session, store) -> bool:
    """Whether the store stands where the terminal stands."""
    (talk,) = store.conversations()
    found, _ = state_of(store.tree(talk.id), SYSTEM)
    return found == session.conversation.state


def test_nothing_is_stored_before_something_is_said(store, say):
    say("/help")
    say("/set temperature 0.5")
    assert store.conversations() == []


def test_every_reply_is_stored_as_it_comes(session, store, say):
    say("hi")
    say("more")
    assert stored(store) == ["hi", "You said hi (101)", "more", "You said more (102)"]
    assert same(session, store)
    say("cut")
    assert same(session, store)


def test_undo_goes_back_and_what_comes_then_is_a_branch(session, store, say):
    say("hi")
    say("more")
    say("/undo")
    assert stored(store) == ["hi", "You said hi (101)"]
    say("other")
    assert stored(store) == ["hi", "You said hi (101)", "other", "You said other (103)"]
    listed = say("/branches").err.splitlines()
    assert listed == [
        "  1  4 messages  more", "      You said more (102)", "* 2  4 messages  other", "      You said other (103)",
    ]  # fmt: skip
    say("/branches 1")
    assert stored(store)[-1] == "You said more (102)"
    assert same(session, store)
    say("/undo")
    assert stored(store)[-1] == "You said other (103)"
    assert "there is no branch '7'; there are 2" in say("/branches 7").err


def test_undoing_the_first_question_stays_in_the_conversation(session, store, say):
    say("hi")
    say("/undo")
    assert stored(store) == []
    say("hello")
    assert stored(store) == ["hello", "You said hello (102)"]


def test_a_new_reply_is_beside_the_old_one(session, store, say):
    say("hi")
    say("/retry 7")
    assert stored(store) == ["hi", "You said hi (7)"]
    (talk,) = store.conversations()
    question, old, new = store.messages(talk.id)
    assert old.parent == new.parent == question.id
    say("/undo")
    assert stored(store) == ["hi", "You said hi (101)"]
    assert same(session, store)


def test_an_edit_is_beside_the_old_question(session, store, say):
    for line in ("one", "two", "three"):
        say(line)
    session.edit = lambda text: text.upper()
    say("/edit 2")
    assert stored(store) == ["one", "You said one (101)", "TWO", "You said TWO (104)"]
    say("/edit")
    assert stored(store)[2] == "TWO"
    assert same(session, store)
    session.edit = lambda text: " "
    assert "nothing was asked" in say("/edit").err
    for wrong in ("0", "3", "two", "-1"):
        assert "there is no question" in say(f"/edit {wrong}").err
    session.edit = None
    assert "on a terminal" in say("/edit 1").err


def test_a_question_without_reply_can_be_asked_again_or_edited(session, store, say):
    say("hi")
    assert "/retry asks it again" in say("nothing").err
    assert stored(store) == ["hi", "You said hi (101)"]
    assert "/retry asks it again" in say("/retry").err
    session.edit = lambda text: text + "!"
    say("/edit")
    assert stored(store)[2:] == ["nothing!", "You said nothing! (104)"]
    assert session.unanswered is None
    say("broken")
    assert session.unanswered == "broken"
    assert stored(store)[2:] == ["nothing!", "You said nothing! (104)"]


def test_an_edit_without_reply_is_asked_again_in_its_place(session, store, say, monkeypatch):
    for line in ("one", "two"):
        say(line)
    session.edit = lambda text: "nothing"
    say("/edit 1")
    assert stored(store)[::2] == ["one", "two"]
    monkeypatch.setattr(session.llm, "_speak", lambda *_: FakeLLM()._speak("one!", SamplingParams(seed=1)))
    say("/retry")
    assert stored(store) == ["nothing", "You said one! (1)"]


def test_a_new_reply_that_fails_leaves_the_old_one(session, store, say, monkeypatch):
    say("hi")
    monkeypatch.setattr(session.llm, "_speak", lambda *_: iter(()))
    assert "no reply, so the old one stays" in say("/retry").err
    assert session.unanswered is None
    assert stored(store) == ["hi", "You said hi (101)"]
    assert same(session, store)


def test_clear_begins_another_conversation_and_undo_brings_the_old_one_back(session, store, say):
    say("hi")
    say("/clear")
    say("new")
    assert [talk.title for talk in store.conversations()] == ["new", "hi"]
    say("/undo")
    say("/undo")
    say("more")
    assert [talk.title for talk in store.conversations()] == ["hi", "new"]
    assert [m.content for m in store.path(store.conversations()[0].id)][::2] == ["hi", "more"]


def test_settings_are_stored_and_the_model_s_own_system_prompt_is_not(session, store, say):
    say("hi")
    (talk,) = store.conversations()
    assert talk.settings == {}
    store.set_settings(talk.id, {"of": "the page"})
    say("/system Be brief.")
    say("/set top_p 0.5")
    assert store.conversation(talk.id).settings == {
        "of": "the page",
        "system": "Be brief.",
        "sampling": {"top_p": 0.5},
    }
    say("/undo")
    say("/undo")
    assert store.conversation(talk.id).settings == {"of": "the page"}


def test_a_loaded_file_is_a_conversation_of_its_own(session, store, say, tmp_path):
    say("hi")
    say(f"/save {tmp_path}/talk.json")
    say("/clear")
    say(f"/load {tmp_path}/talk.json")
    assert [talk.title for talk in store.conversations()] == ["hi", "hi"]
    say("more")
    first, second = store.conversations()
    assert (len(store.path(first.id)), len(store.path(second.id))) == (4, 2)


def test_a_conversation_that_somebody_removes_meanwhile_is_stored_anew(session, store, say):
    say("hi")
    store.delete(store.conversations()[0].id)
    say("more")
    assert stored(store) == ["hi", "You said hi (101)", "more", "You said more (102)"]
    assert same(session, store)


def test_two_terminals_in_one_conversation_write_two_branches(session, store, say):
    say("hi")
    (talk,) = store.conversations()
    state, _ = state_of(store.tree(talk.id), SYSTEM)
    other = Session(FakeLLM(), Conversation("fake", state), keeper=Keeper(store, "fake", SYSTEM))
    repl.handle(other, "theirs")
    say("mine")
    assert len(session.keeper.branches(session.conversation.state)) == 2
    assert stored(store)[-2:] == ["mine", "You said mine (102)"]
    assert same(session, store)


def test_title(session, store, say):
    assert say("/title").err == "nothing is stored yet\n"
    say("hi")
    assert say("/title").err.endswith("  hi\n")
    say("/title Greetings")
    assert store.conversations()[0].title == "Greetings"


def test_without_a_keeper_nothing_is_stored_and_commands_say_so(store, capsys):
    session = Session(FakeLLM(), Conversation("fake", State(SYSTEM, SamplingParams())))
    repl.handle(session, "hi")
    repl.handle(session, "/branches")
    repl.handle(session, "/title x")
    assert capsys.readouterr().err.count("this conversation is not kept") == 2
    assert store.conversations() == []
