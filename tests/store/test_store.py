"""Conversations on disk: a tree that can be edited and searched, two writers, a crash, and files that are refused."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlet.errors import NotStoredError, StoreError
from qwenlet.store import SCHEMA_VERSION, Conversation, Store, data_dir, database, responses, title_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "history.sqlite3"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with Store.open(path) as opened:
        yield opened


def contents(store: Store, conversation: str) -> list[str]:
    return [message.content for message in store.path(conversation)]


# ----------------------------------------------------------------------------------------------------------- the tree


def test_what_was_written_is_there_again(path: Path):
    with Store.open(path) as store:
        talk = store.new_conversation("首都", model="demo")
        store.append(talk.id, "user", "法国的首都？", {"n": [1, "二"]})
        store.append(talk.id, "assistant", "巴黎。")
    with Store.open(path) as store:
        assert [one.title for one in store.conversations()] == ["首都"]
        first, second = store.path(talk.id)
        assert (first.role, first.content, first.extra, first.parent) == (
            "user",
            "法国的首都？",
            {"n": [1, "二"]},
            None,
        )
        assert (second.role, second.content, second.parent) == ("assistant", "巴黎。", first.id)


def test_an_edit_is_a_branch_and_the_old_one_can_be_chosen_again(store: Store):
    talk = store.new_conversation()
    question = store.append(talk.id, "user", "France?")
    store.append(talk.id, "assistant", "Paris.")
    edited = store.branch(question.id, "Italy?")
    store.append(talk.id, "assistant", "Rome.")
    assert contents(store, talk.id) == ["Italy?", "Rome."]
    assert store.select(question.id).content == "Paris."
    assert contents(store, talk.id) == ["France?", "Paris."]
    again = store.add(talk.id, edited.id, "assistant", "Roma.")
    assert contents(store, talk.id) == ["Italy?", "Roma."]
    store.update(again.id, "Roma!", {"tokens": 3})
    assert store.message(again.id).extra == {"tokens": 3}
    store.update(again.id, "Roma!!")
    assert store.message(again.id).extra == {"tokens": 3}
    assert [m.content for m in store.messages(talk.id)] == ["France?", "Paris.", "Italy?", "Rome.", "Roma!!"]


def test_list_rename_delete(store: Store):
    first, second = store.new_conversation("a"), store.new_conversation("b")
    assert [one.title for one in store.conversations()] == ["b", "a"]
    store.append(first.id, "user", "later")
    assert [one.title for one in store.conversations()] == ["a", "b"]
    assert [one.title for one in store.conversations(limit=1, offset=1)] == ["b"]
    store.rename(second.id, "c")
    assert store.conversation(second.id).title == "c"
    store.delete(first.id)
    assert [one.title for one in store.conversations()] == ["c"]
    assert store.search("later") == []
    for missing in (lambda: store.path(first.id), lambda: store.message("x"), lambda: store.append("x", "user", "y"),
                    lambda: store.rename("x", "y"), lambda: store.delete("x")):  # fmt: skip
        with pytest.raises(StoreError, match="there is no"):
            missing()


def test_a_conversation_is_called_after_its_first_question(store: Store):
    talk = store.new_conversation()
    store.append(talk.id, "system", "Speak like a pirate.")
    store.append(talk.id, "user", "\n  What is   rain?\nAnd snow?")
    assert store.conversation(talk.id).title == "What is rain?"
    store.append(talk.id, "user", "And hail?")
    assert store.conversation(talk.id).title == "What is rain?"
    assert title_of("雨" * 100) == "雨" * 59 + "…"
    assert title_of(" \n ") == ""


def test_settings_stay_with_the_conversation(store: Store):
    talk = store.new_conversation(settings={"system": "短く", "sampling": {"top_p": 0.5}})
    assert store.conversation(talk.id).settings == {"system": "短く", "sampling": {"top_p": 0.5}}
    store.set_settings(talk.id, {"system": ""})
    assert store.tree(talk.id).conversation.settings == {"system": ""}
    with pytest.raises(StoreError, match="there is no conversation"):
        store.set_settings("x", {})
    with pytest.raises(StoreError, match="not JSON"):
        store.set_settings(talk.id, {"top_p": float("nan")})


def test_going_back_leaves_what_followed_on_a_branch_of_its_own(store: Store):
    talk = store.new_conversation()
    question, answer = store.append(talk.id, "user", "France?"), store.append(talk.id, "assistant", "Paris.")
    store.append(talk.id, "user", "Italy?")
    store.go_back(talk.id, answer.id)
    store.append(talk.id, "user", "Spain?")
    assert contents(store, talk.id) == ["France?", "Paris.", "Spain?"]
    store.go_back(talk.id, None)
    assert contents(store, talk.id) == []
    assert [m.content for m in store.messages(talk.id)] == ["France?", "Paris.", "Italy?", "Spain?"]
    with pytest.raises(StoreError, match="another conversation"):
        store.go_back(store.new_conversation().id, question.id)
    with pytest.raises(StoreError, match="there is no conversation"):
        store.go_back("x", None)


def test_a_message_is_told_as_clients_tell_it(store: Store):
    talk = store.new_conversation()
    calls = [{"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}]
    store.append(talk.id, "assistant", "", {"tool_calls": calls, "reasoning_content": None, "finish_reason": "stop"})
    store.append(talk.id, "tool", "noon", {"tool_call_id": "call_1"})
    assert [message.as_told() for message in store.path(talk.id)] == [
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "noon", "tool_call_id": "call_1"},
    ]


def test_adopted_conversations_get_ids_of_their_own_and_all_come_or_none(store: Store):
    talk = store.new_conversation("a", settings={"system": "s"})
    question = store.append(talk.id, "user", "France?")
    store.append(talk.id, "assistant", "Paris.")
    store.branch(question.id, "Italy?")
    tree = store.tree(talk.id)
    (copy,) = store.adopt([tree])
    assert copy.id != talk.id
    assert (copy.title, copy.settings, copy.updated) == ("a", {"system": "s"}, tree.conversation.updated)
    assert contents(store, copy.id) == ["Italy?"]
    assert [m.content for m in store.messages(copy.id)] == ["France?", "Paris.", "Italy?"]
    bad = replace(tree, messages=(replace(tree.messages[0], content="\ud800"),))
    bad = replace(bad, conversation=replace(tree.conversation, current=None))
    with pytest.raises(StoreError, match="surrogate"):
        store.adopt([tree, bad])
    assert len(store.conversations()) == 2


def test_an_excerpt_is_one_line_around_the_word(store: Store):
    talk = store.new_conversation("t")
    store.append(talk.id, "user", "x" * 100 + "\nHail\tand snow\n" + "y" * 100)
    (hit,) = store.search("hail")
    assert hit.excerpt == "…" + "x" * 39 + " Hail and snow " + "y" * 26 + "…"


def test_a_conversation_is_found_by_the_beginning_of_its_id(store: Store):
    one, two = store.new_conversation("a"), store.new_conversation("b")
    assert store.find(one.id) == store.find(one.short_id) == one
    with store._write() as db:
        db.execute("UPDATE conversations SET id = 'conv_' || substr(?, 6, 4) || 'xyz' WHERE id = ?", (one.id, two.id))
    with pytest.raises(StoreError, match="several conversations"):
        store.find(one.short_id[:4])
    for wrong in ("", "conv_", "zz", "%", "_"):
        with pytest.raises(NotStoredError, match="there is no conversation"):
            store.find(wrong)


def test_a_message_stays_in_its_own_conversation(store: Store):
    one, other = store.new_conversation(), store.new_conversation()
    message = store.append(one.id, "user", "q")
    with pytest.raises(StoreError, match="another conversation"):
        store.add(other.id, message.id, "assistant", "a")
    assert store.messages(other.id) == []


def test_search_finds_parts_of_words_in_any_script(store: Store):
    talk = store.new_conversation("Rainfall in 北京")
    store.append(talk.id, "user", "How WARM is it, 100%?")
    store.append(talk.id, "assistant", "北京今天的天气很好。")

    def found(text: str) -> list[str]:
        return ["title" if hit.message is None else hit.message.content[:3] for hit in store.search(text)]

    assert found("warm") == ["How"]
    assert found("天气") == ["北京今"]
    assert found("今天的天气") == ["北京今"]
    assert found("北京") == ["title", "北京今"]
    assert found("how arm 100%") == ["How"]
    assert found("0%") == ["How"]
    assert found('"') == found("warm cold") == found("") == found("%_") == []
    message = store.messages(talk.id)[0]
    store.update(message.id, "How cold?")
    assert found("warm") == []
    assert found("cold") == ["How"]


@pytest.fixture(scope="module")
def long_lived(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with Store.open(tmp_path_factory.mktemp("store") / "history.sqlite3") as opened:
        yield opened


@given(text=st.text(max_size=20), query=st.text(max_size=10))
def test_no_query_breaks_the_search_and_a_message_is_found_by_itself(long_lived: Store, text: str, query: str):
    talk = long_lived.new_conversation()
    long_lived.append(talk.id, "user", text)
    for hit in long_lived.search(query):
        assert hit.conversation.title == title_of(text) if hit.message is None else hit.message.content == text
        assert "\n" not in hit.excerpt
    assert long_lived.path(talk.id)[0].content == text
    words = text.replace("\0", " ").split()
    found = [hit.message.content for hit in long_lived.search(text) if hit.message]
    long_lived.delete(talk.id)
    if words and "\0" not in text:
        assert found == [text]


def test_responses(store: Store):
    assert store.response("resp_1") is None
    store.save_response("resp_1", {"status": "in_progress"}, ({"role": "user", "content": "q"},), previous="resp_0")
    store.save_response("resp_1", {"status": "completed"})
    kept = store.response("resp_1")
    assert kept is not None
    assert (kept.previous, kept.body, kept.input) == (
        "resp_0",
        {"status": "completed"},
        ({"role": "user", "content": "q"},),
    )
    # what one key's holder keeps is not there for others, nor can they replace or delete it
    assert store.response("resp_1", owner="b") is None
    store.save_response("resp_1", {"status": "stolen"}, owner="b")
    assert store.response("resp_1") == kept
    assert not store.delete_response("resp_1", owner="b")
    assert store.delete_response("resp_1")
    assert not store.delete_response("resp_1")
    with pytest.raises(StoreError, match="not JSON"):
        store.save_response("resp_2", {"x": object()})


def test_responses_go_after_a_month(store: Store, monkeypatch: pytest.MonkeyPatch):
    store.save_response("resp_1", {})
    later = time.time() + 31 * 86_400
    monkeypatch.setattr(responses.time, "time", lambda: later)
    assert store.response("resp_1") is None  # told as gone even before it is
    store.expire_responses()
    assert store._read("SELECT id FROM responses") == []


def test_the_oldest_responses_go_where_there_are_too_many(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(responses, "MOST_RESPONSES", 3)
    store.save_response("other", {}, owner="b")
    for number in range(5):
        store.save_response(f"resp_{number}", {})
    left = [number for number in range(5) if store.response(f"resp_{number}") is not None]
    assert left == [2, 3, 4]
    assert store.response("other", owner="b") is not None  # each owner has room of its own


def test_the_oldest_responses_go_where_they_are_too_large(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(responses, "MOST_BYTES", 3_000)
    for number in range(5):
        store.save_response(f"resp_{number}", {"text": "字" * 300})
    left = [number for number in range(5) if store.response(f"resp_{number}") is not None]
    assert left == [2, 3, 4]
    store.save_response("resp_2", {"text": "x" * 2_000})
    assert store.response("resp_2") is None


def test_a_store_in_memory_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QWENLET_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with Store.open_in_memory() as store:
        store.save_response("resp_1", {"a": 1})
        with ThreadPoolExecutor(1) as pool:
            kept = pool.submit(store.response, "resp_1").result()
        assert kept is not None
        assert kept.body == {"a": 1}
    with Store.open_in_memory() as store:
        assert store.response("resp_1") is None
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------- more than one writer


WRITER = """
import sys
from qwenlet.store import Store
with Store.open(sys.argv[1]) as store:
    talk = store.new_conversation(sys.argv[2])
    print("ready", flush=True)
    for number in range(int(sys.argv[3])):
        store.append(talk.id, "user", f"{sys.argv[2]} {number}")
        print(number, flush=True)
"""


def writer(path: Path, name: str, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", WRITER, path, name, str(count)], stdout=subprocess.PIPE, text=True)


def test_two_processes_make_and_write_one_file(path: Path):
    both = [writer(path, name, 150) for name in ("a", "b")]
    assert [process.wait(60) for process in both] == [0, 0]
    for process in both:
        assert process.stdout is not None
        process.stdout.close()
    with Store.open(path) as store:
        talks = {talk.title: contents(store, talk.id) for talk in store.conversations()}
    assert talks == {name: [f"{name} {number}" for number in range(150)] for name in ("a", "b")}


def test_a_killed_writer_leaves_everything_it_had_reported(path: Path):
    process = writer(path, "a", 1_000_000)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(60)]
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read().split()
    process.wait()
    process.stdout.close()
    reported = int(([*lines, *rest])[-1]) if rest or lines else 0
    with Store.open(path) as store:
        (talk,) = store.conversations()
        written = contents(store, talk.id)
        assert written == [f"a {number}" for number in range(len(written))]
        assert len(written) >= reported
        store.append(talk.id, "user", "goes on")


def test_threads_share_a_store(store: Store):
    talk = store.new_conversation()
    failures: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for number in range(50):
                store.append(talk.id, "user", f"{name}{number}")
                store.path(talk.id)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(store.path(talk.id)) == 100


def test_a_file_that_stays_locked_is_said_to_be(store: Store, path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(database, "_LOCK_SECONDS", 0.05)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with Store.open(path) as second, pytest.raises(StoreError, match="locked by another process"):
        second.new_conversation()
    other.execute("ROLLBACK")
    other.close()
    store.new_conversation()


# ----------------------------------------------------------------------------------------------- files that are refused


def test_only_the_owner_may_read_it(store: Store, path: Path):
    store.new_conversation()
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def refused(path: Path, said: str) -> None:
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    with pytest.raises(StoreError, match=said):
        Store.open(path)
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before


def test_a_file_that_is_no_database(tmp_path: Path):
    path = tmp_path / "x"
    path.write_text("dear diary, " * 50)
    refused(path, "damaged, or not a database")
    path.write_text("short")
    refused(path, "damaged, or not a database")


def test_a_damaged_file(path: Path):
    with Store.open(path) as store:
        talk = store.new_conversation()
        for _ in range(200):
            store.append(talk.id, "user", "x" * 400)
    damaged = bytearray(path.read_bytes())
    damaged[4096:] = os.urandom(len(damaged) - 4096)
    path.write_bytes(damaged)
    refused(path, "damaged, or not a database")


def test_another_program_s_database(tmp_path: Path):
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE t (x)")
    db.close()
    refused(path, "a database of another program")


def test_a_newer_file(path: Path):
    Store.open(path).close()
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    db.close()
    refused(path, f"newer qwenlet: its schema is {SCHEMA_VERSION + 1}, and this one knows {SCHEMA_VERSION}")


def test_an_older_file_is_brought_up_to_date(path: Path, monkeypatch: pytest.MonkeyPatch):
    with Store.open(path) as store:
        talk = store.new_conversation("kept")
    more = (*database._MIGRATIONS, ("ALTER TABLE responses ADD COLUMN extra TEXT",))
    monkeypatch.setattr(database, "_MIGRATIONS", more)
    monkeypatch.setattr(database, "SCHEMA_VERSION", len(more))
    with Store.open(path) as store:
        assert store.conversation(talk.id).title == "kept"
        assert store._read("PRAGMA user_version") == [(len(more),)]
        assert store._read("SELECT extra FROM responses") == []


def test_a_file_of_the_first_version_is_brought_up_to_date(path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(database, "_MIGRATIONS", database._MIGRATIONS[:1])
        patch.setattr(database, "SCHEMA_VERSION", 1)
        Store.open(path).close()
    db = sqlite3.connect(path)
    db.execute("INSERT INTO conversations VALUES ('conv_1', 'old', 'demo', NULL, 1.0, 2.0)")
    db.commit()
    db.close()
    with Store.open(path) as store:
        assert store.conversations() == [Conversation("conv_1", "old", "demo", None, 1.0, 2.0, {})]


def test_what_an_older_file_keeps_of_responses_is_measured(path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(database, "_MIGRATIONS", database._MIGRATIONS[:3])
        patch.setattr(database, "SCHEMA_VERSION", 3)
        Store.open(path).close()
    db = sqlite3.connect(path)
    db.execute("INSERT INTO responses VALUES ('resp_1', NULL, '{\"a\": \"é\"}', '[]', ?, '')", (time.time(),))
    db.commit()
    db.close()
    with Store.open(path) as store:
        assert store._read("SELECT bytes FROM responses") == [(13,)]
        kept = store.response("resp_1")
        assert kept is not None
        assert kept.body == {"a": "é"}


def test_a_migration_that_fails_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch):
    Store.open(path).close()
    wrong = (*database._MIGRATIONS, ("CREATE TABLE half (x)", "nonsense"))
    with monkeypatch.context() as patch:
        patch.setattr(database, "_MIGRATIONS", wrong)
        patch.setattr(database, "SCHEMA_VERSION", len(wrong))
        with pytest.raises(StoreError, match="nonsense"):
            Store.open(path)
    with Store.open(path) as store:
        assert store._read("SELECT name FROM sqlite_master WHERE name = 'half'") == []


def test_a_folder_that_can_t_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="can't be used"):
        Store.open(tmp_path / "file" / "history.sqlite3")
    with pytest.raises(StoreError, match="can't be used"):
        Store.open(tmp_path)


def test_a_closed_store_says_so(path: Path):
    store = Store.open(path)
    store.close()
    with pytest.raises(StoreError, match="can't be used: Cannot operate on a closed database"):
        store.conversations()


def test_where_the_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QWENLET_DATA", str(tmp_path / "mine"))
    assert data_dir() == tmp_path / "mine"
    with Store.open() as store:
        assert store.file == tmp_path / "mine" / "history.sqlite3"
    monkeypatch.delenv("QWENLET_DATA")
    assert data_dir().name == "qwenlet"


def test_two_thousand_messages_are_read_at_once_and_removed_at_once(store: Store):
    talk = store.new_conversation()
    for number in range(2000):
        store.append(talk.id, "user", str(number))
    began = time.perf_counter()
    assert len(store.path(talk.id)) == 2000
    assert time.perf_counter() - began < 1
    store.delete(talk.id)
    assert store.search("1999") == []
