"""What chat keeps, and `qwenlet history`: found again, gone on with, moved out and in, removed, and never half."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from cli.fake import SYSTEM
from qwenlet.cli import console
from qwenlet.store import Store


def told(api) -> list[str]:
    messages, _ = api.llm.requests[-1]
    return [message["content"] for message in messages]


def only(store: Store):
    (talk,) = store.conversations()
    return store.tree(talk.id)


# ------------------------------------------------------------------------------------------------------- chat


def test_a_chat_goes_on_where_it_was_left(run, api):
    run("chat", "some/model", "-p", "hi", "--top-p", "0.5", "--system", "Be brief.")
    assert run("chat", "--continue", "-p", "again").out == "You said again (102)\n"
    assert told(api) == ["Be brief.", "hi", "You said hi (101)", "again"]
    assert [name for name, _ in api.loaded] == ["some/model", "some/model"]
    assert api.llm.requests[-1][1].top_p == 0.5
    run("chat", "-p", "another")
    run("chat", "other/model", "-c", "-p", "third")
    assert told(api) == [SYSTEM, "another", "You said another (103)", "third"]
    assert api.loaded[-1][0] == "other/model"
    with Store.open() as store:
        assert [talk.title for talk in store.conversations()] == ["another", "hi"]
        first = store.conversations()[1]
    run("chat", "--resume", first.short_id, "-p", "back")
    assert told(api)[1] == "hi"


def test_a_model_s_folder_is_found_from_elsewhere(run, api, tmp_path, monkeypatch):
    (tmp_path / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    run("chat", "model", "-p", "hi")
    monkeypatch.chdir(tmp_path)
    run("chat", "-c", "-p", "again")
    assert api.loaded[-1][0] == str(tmp_path / "here" / "model")


def test_an_answer_as_json_names_its_conversation(run):
    answer = json.loads(run("chat", "-p", "hi", "--json").out)
    assert answer["reply"] == "You said hi (101)"
    assert (answer["finish_reason"], answer["seed"], answer["prompt_tokens"]) == ("stop", 101, 10)
    assert answer["timings"]["decode_tokens_per_second"] == 10
    assert json.loads(run("chat", "--resume", answer["conversation"], "-p", "x", "--json").out)["reply"] == (
        "You said x (102)"
    )
    refused = run("chat", "--json")
    assert refused.code != 0
    assert refused.out == ""


@pytest.mark.parametrize("off", ["flag", "environment"])
def test_history_is_off_with_one_flag(run, monkeypatch, off, tmp_path):
    flags = ["--no-history"] if off == "flag" else []
    monkeypatch.setenv("QWENLET_NO_HISTORY", "1" if off == "environment" else "0")
    answer = run("chat", "-p", "hi", "--json", *flags)
    assert json.loads(answer.out)["conversation"] is None
    assert not (tmp_path / "data").exists()
    refused = run("chat", "--continue", "-p", "hi", *flags)
    assert refused.err.startswith("error: the history is off, so there is no conversation to go on with")


def test_nothing_to_go_on_with(run, api):
    assert run("chat", "-c", "-p", "x").err.startswith("error: there is no conversation to go on with yet")
    assert run("chat", "--resume", "abc", "-p", "x").err.startswith("error: there is no conversation 'abc'")
    assert run("chat", "--resume", "abc", "-c", "-p", "x").code == 2
    assert api.loaded == []


def test_a_question_that_brought_no_reply_is_kept_apart(run, api):
    run("chat", "-p", "hi")
    run("chat", "-c", "-p", "too long")
    run("chat", "-c", "-p", "more")
    assert told(api) == [SYSTEM, "hi", "You said hi (101)", "more"]
    with Store.open() as store:
        tree = only(store)
    assert [m.content for m in tree.messages][2:] == ["too long", "more", "You said more (103)"]


def test_a_damaged_history_costs_no_answer_and_stays_as_it_is(run, tmp_path):
    file = tmp_path / "data" / "history.sqlite3"
    file.parent.mkdir()
    file.write_text("dear diary, " * 50)
    result = run("chat", "-p", "hi")
    assert result.out == "You said hi (101)\n"
    assert "this conversation is not kept" in result.err
    assert "damaged, or not a database" in result.err
    assert run("chat", "-c", "-p", "hi").code == 1
    assert run("history", "list").code == 1
    assert file.read_text() == "dear diary, " * 50


def test_a_history_that_fails_on_the_way_costs_no_answer(run, monkeypatch, tmp_path):
    run("chat", "-p", "hi")
    monkeypatch.setattr("qwenlet.store.database._LOCK_SECONDS", 0.05)
    other = sqlite3.connect(tmp_path / "data" / "history.sqlite3", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    result = run("chat", "-p", "again")
    other.execute("ROLLBACK")
    other.close()
    assert result.out == "You said again (102)\n"
    assert "this conversation is not kept" in result.err
    assert "locked by another process" in result.err


# ------------------------------------------------------------------------------------------------------- attachments


def test_files_are_attached_below_the_question(run, api, tmp_path):
    (tmp_path / "a.txt").write_text("alpha\n")
    (tmp_path / "b.md").write_text("```\nbeta\n```")
    result = run("chat", "-p", "Compare.", "-a", str(tmp_path / "a.txt"), "--attach", str(tmp_path / "b.md"))
    assert told(api)[-1] == (
        f"Compare.\n\n{tmp_path}/a.txt:\n```\nalpha\n```\n\n{tmp_path}/b.md:\n````\n```\nbeta\n```\n````"
    )
    assert f"attached {tmp_path}/a.txt, 5 bytes" in result.err
    refused = run("chat", "-p", "x", "-a", str(tmp_path / "none.txt"))
    assert refused.err.startswith(f"error: can't read {tmp_path}/none.txt: No such file")


# ------------------------------------------------------------------------------------------------------- the verb


@pytest.fixture
def kept(run) -> None:
    run("chat", "-p", "What is rain?")
    run("chat", "-c", "-p", "And snow?")
    run("chat", "-p", "北京的天气怎么样？")


def ids(run) -> list[str]:
    return [line.split()[0] for line in run("history", "list").out.splitlines()]


def test_list_and_search(run, kept):
    listed = run("history", "list")
    assert [line.split("  ")[-1] for line in listed.out.splitlines()] == ["北京的天气怎么样？", "What is rain?"]
    assert listed.err == ""
    assert "--limit shows more" in run("history", "list", "-n", "1").err
    assert json.loads(run("history", "list", "--json").out.splitlines()[0])["title"] == "北京的天气怎么样？"
    found = run("history", "search", "SNOW").out.splitlines()
    assert found[0].endswith("  assistant: You said And snow? (102)") or "What is rain?" in found[0]
    assert any(line == "  user: And snow?" for line in found)
    assert run("history", "search", "天气").out.splitlines()[0].endswith("北京的天气怎么样？")
    nothing = run("history", "search", "hail")
    assert (nothing.code, nothing.out, nothing.err) == (1, "", "nothing has 'hail'\n")


def test_show_rename_and_rm(run, kept):
    _, old = ids(run)
    shown = run("history", "show", old)
    assert shown.out == (
        "user> What is rain?\n\nassistant> You said What is rain? (101)\n\nuser> And snow?\n\n"
        "assistant> You said And snow? (102)\n\n"
    )
    assert run("history", "rename", old, "Weather").code == 0
    assert "Weather" in run("history", "show", old).err
    refused = run("history", "rm", old, stdin=b"")
    assert refused.err.splitlines()[1:] == [
        "error: there is no terminal to ask whether these shall go",
        "hint: --yes removes them",
    ]
    assert run("history", "rm", old, "--yes").err.endswith("removed 1 conversation\n")
    assert len(ids(run)) == 1
    assert run("history", "rm").code == 2
    assert run("history", "rm", "--all", "-y").code == 0
    assert run("history", "list").err.startswith("no conversations yet")
    assert run("history", "show", old).err.startswith("error: there is no conversation")


@pytest.mark.parametrize("form", ["json", "markdown"])
def test_what_goes_out_comes_in_again(run, kept, tmp_path, form):
    file = tmp_path / "out"
    before = [run("history", "show", id).out for id in ids(run)]
    assert "2 conversations in" in run("history", "export", "--all", "--to", form, "-o", str(file)).err
    assert "exists already" in run("history", "export", "--all", "-o", str(file)).err
    assert run("history", "export", "--all", "--to", form).out == file.read_text()
    run("history", "rm", "--all", "-y")
    result = run("history", "import", str(file))
    assert f"{file}: 2 conversations out of our" in result.err
    assert [line.split()[0] for line in result.out.splitlines()] == ids(run)
    assert [run("history", "show", id).out for id in ids(run)] == before
    run("history", "rm", "--all", "-y")
    assert run("history", "import", "-", stdin=file.read_bytes()).code == 0
    assert len(ids(run)) == 2


def test_an_import_brings_all_files_or_none(run, tmp_path):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    picture = [{"type": "image_url"}, {"type": "text", "text": "What is this?"}]
    good.write_text(json.dumps([{"role": "user", "content": picture}]))
    bad.write_text('{"name": "somebody else\'s"}')
    refused = run("history", "import", str(good), str(bad))
    assert refused.err.startswith(f"error: {bad}: holds an object with name, in which no conversation is known")
    assert ids(run) == []
    assert "left out: 1 × content of the type 'image_url'" in run("history", "import", str(good)).err
    assert len(ids(run)) == 1


def test_control_characters_reach_files_but_no_terminal(run, monkeypatch):
    run("chat", "-p", "escape")
    (id,) = ids(run)
    assert "\x1b[31mred\x07" in run("history", "show", id).out
    monkeypatch.setattr(console, "is_terminal", lambda stream: True)
    assert "\x1b" not in run("history", "show", id).out
    assert "\x1b" not in run("history", "export", id).out


def test_the_file_is_its_owner_s(run, kept, tmp_path):
    assert all((file.stat().st_mode & 0o077) == 0 for file in Path(tmp_path / "data").iterdir())
