"""Conversations leave as JSON and Markdown and come back whole; other programs' files come in, or are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlet.errors import QwenletError, RequestError
from qwenlet.store import Conversation, Store, StoredMessage, Tree
from qwenlet.store.interchange import read, to_json, to_markdown

CALL = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "--> UTC"}'}}


def plain(tree: Tree) -> tuple[Any, ...]:
    """What must survive: the shape without its ids."""
    place = {message.id: number for number, message in enumerate(tree.messages)}
    talk = tree.conversation
    return (
        talk.title, talk.model, dict(talk.settings), talk.created, talk.updated, place.get(talk.current or ""),
        [(place.get(m.parent or ""), m.role, m.content, m.created, dict(m.extra)) for m in tree.messages],
    )  # fmt: skip


def told(tree: Tree) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in tree.told()]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    with Store.open(tmp_path / "history.sqlite3") as store:
        talk = store.new_conversation("时间", "demo", {"system": "Be brief.", "sampling": {"top_p": 0.5}})
        question = store.append(talk.id, "user", "What time is it?")
        store.append(talk.id, "assistant", "Late.")
        store.branch(question.id, "几点了？")
        store.append(talk.id, "assistant", "", {"tool_calls": [CALL], "reasoning_content": "I look."})
        store.append(talk.id, "tool", "12:00", {"tool_call_id": "call_1"})
        store.append(talk.id, "assistant", "Noon", {"finish_reason": "length", "timings": {"s": 1.5}})
        return store.tree(talk.id)


# ------------------------------------------------------------------------------------------------------- our own


def test_json_brings_everything_back(tree: Tree):
    imported = read(to_json([tree, tree]))
    assert [plain(one) for one in imported.trees] == [plain(tree)] * 2
    assert (imported.source, imported.notes) == ("our JSON", ())


def test_markdown_brings_the_shown_branch_back(tree: Tree):
    text = to_markdown(tree)
    assert "# 时间\n" in text
    assert '## Assistant, calling clock({"zone": "--> UTC"})\n' in text
    (back,) = read(text).trees
    assert back.told() == tree.told()
    assert back.conversation.settings == tree.conversation.settings
    assert back.path[-1].extra == {"finish_reason": "length"}
    assert [m.created for m in back.path] == [m.created for m in tree.path]


texts = st.text(alphabet=st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ["\n", "\n\nx\n\n", "## User\n", "<!-- message {} -->", 'a\n<!-- message {"role": "user"} -->\nb', 
     "\\<!-- message x", '<!-- qwenlet conversation {"version": 1} -->', "\r\n", "```\n"]
)  # fmt: skip


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    messages: list[StoredMessage] = []
    for number in range(draw(st.integers(0, 6))):
        parent = draw(st.none() | st.sampled_from([m.id for m in messages])) if messages else None
        role = draw(st.sampled_from(["user", "assistant", "system", "tool"]))
        messages.append(StoredMessage(str(number), "", parent, role, draw(texts), draw(st.floats(0, 1e10))))
    current = draw(st.none() | st.sampled_from([m.id for m in messages])) if messages else None
    return Tree(Conversation("", draw(texts), draw(texts), current, 1.0, 2.0, {"system": draw(texts)}), tuple(messages))


@given(st.lists(trees(), min_size=1, max_size=3))
def test_any_conversation_survives_both_ways(many: list[Tree]):
    assert [plain(one) for one in read(to_json(many)).trees] == [plain(one) for one in many]
    back = read("".join(map(to_markdown, many))).trees
    assert [[(m.role, m.content, m.created) for m in one.path] for one in back] == [
        [(m.role, m.content, m.created) for m in one.path] for one in many
    ]
    assert [one.conversation.title for one in back] == [one.conversation.title for one in many]


def test_a_newer_file_is_refused(tree: Tree):
    document = json.loads(to_json([tree]))
    with pytest.raises(RequestError, match=r"x\.json: was written by a newer qwenlet: its version is 2"):
        read(json.dumps(document | {"version": 2}), "x.json")
    with pytest.raises(RequestError, match="version is 2, expected 1"):
        read(to_markdown(tree).replace('"version": 1', '"version": 2'))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"title": 3}, r"conversations\[0\]\.title is 3, expected text"),
        ({"current": "nobody"}, r"conversations\[0\]\.current is \"nobody\", expected null or the id"),
        ({"colour": 1}, r"conversations\[0\] has the field 'colour'"),
        ({"created": "now"}, r"conversations\[0\]\.created is \"now\", expected seconds"),
        ({"messages": {}}, r"conversations\[0\]\.messages is \{\}, expected a list"),
        ({"settings": {"system": 1}}, "the system prompt is 1, expected text"),
        ({"settings": {"a": "\udc00"}}, "half a surrogate pair"),
    ],
)
def test_damage_in_our_own_is_refused_by_its_place(tree: Tree, change: dict[str, Any], said: str):
    document = json.loads(to_json([tree]))
    document["conversations"][0] |= change
    with pytest.raises(RequestError, match=said):
        read(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"role": "robot"}, r"messages\[1\]\.role is \"robot\", expected one of system, user"),
        ({"content": None}, r"messages\[1\]\.content is null, expected text"),
        ({"content": "\ud800"}, "half a surrogate pair"),
        ({"extra": {"a": [{"\ud800": 1}]}}, "half a surrogate pair"),
        ({"parent": "later"}, r"messages\[1\]\.parent is \"later\""),
        ({"extra": {"tool_calls": 7}}, "tool_calls is 7, expected a list"),
        ({"extra": {"tool_calls": [7]}}, "a tool call is 7"),
        ({"extra": []}, r"messages\[1\]\.extra is \[\], expected an object"),
    ],
)
def test_damage_in_a_message_is_refused_by_its_place(tree: Tree, change: dict[str, Any], said: str):
    document = json.loads(to_json([tree]))
    document["conversations"][0]["messages"][1] |= change
    with pytest.raises(RequestError, match=said):
        read(json.dumps(document))
    document["conversations"][0]["messages"][1] = document["conversations"][0]["messages"][0]
    with pytest.raises(RequestError, match="an id that no other message has"):
        read(json.dumps(document))


# ------------------------------------------------------------------------------------------------------- others


def node(id: str, parent: str | None, role: str, text: Any, **more: Any) -> dict[str, Any]:
    content = text if isinstance(text, dict) else {"content_type": "text", "parts": [text]}
    message = {"id": id, "author": {"role": role}, "content": content, "create_time": float(ord(id)), **more}
    return {"id": id, "parent": parent, "children": [], "message": message}


def chatgpt(*nodes: dict[str, Any], current: str | None) -> dict[str, Any]:
    root = {"id": "root", "parent": None, "children": [], "message": None}
    mapping = {one["id"]: one for one in (root, *nodes)}
    return {"title": "Capitals", "create_time": 10.0, "update_time": 20.0, "mapping": mapping, "current_node": current}


def test_chatgpt_s_export_keeps_its_branches_and_says_what_it_leaves():
    photo = {"content_type": "multimodal_text", "parts": [{"asset_pointer": "file-1"}, "What is this?"]}
    document = chatgpt(
        node("b", "root", "system", "Be kind."),
        node("c", "b", "user", "France?"),
        node("g", "c", "assistant", "Paris, again."),
        node("d", "c", "assistant", "Paris."),
        node("e", "d", "user", photo),
        node("f", "e", "tool", "a search result"),
        node("h", "f", "assistant", {"content_type": "thoughts", "thoughts": []}),
        node("i", "h", "assistant", "A tower."),
        current="i",
    )
    imported = read(json.dumps([document]))
    (tree,) = imported.trees
    assert imported.source == "ChatGPT's export"
    assert tree.conversation.title == "Capitals"
    assert (tree.conversation.created, tree.conversation.updated) == (10.0, 20.0)
    assert told(tree) == [
        ("system", "Be kind."), ("user", "France?"), ("assistant", "Paris."), ("user", "What is this?"),
        ("assistant", "A tower."),
    ]  # fmt: skip
    assert [m.content for m in tree.messages if m.parent == tree.messages[0].id] == ["Paris.", "Paris, again."]
    assert set(imported.notes) == {
        "left out: 1 × picture, sound or file",
        "left out: 1 × call or result of one of ChatGPT's tools",
        "left out: 1 × content of the type 'thoughts'",
    }


def test_a_chatgpt_export_without_text_or_with_a_circle():
    empty = chatgpt(node("b", "root", "system", ""), current="b")
    full = chatgpt(node("b", "root", "user", "hi"), current="gone")
    imported = read(json.dumps([empty, full]))
    assert [told(tree) for tree in imported.trees] == [[("user", "hi")]]
    assert imported.notes == ("left out: 1 × conversation without any text",)
    circle = chatgpt(node("b", "c", "user", "x"), node("c", "b", "user", "y"), current="b")
    with pytest.raises(RequestError, match="follow themselves"):
        read(json.dumps(circle))


def test_a_very_long_chatgpt_conversation():
    nodes = [node("b", "root", "user", "0")]
    nodes += [nodes[0] | {"id": f"n{i}", "parent": f"n{i - 1}" if i else "b"} for i in range(5000)]
    (tree,) = read(json.dumps(chatgpt(*nodes, current="n4999"))).trees
    assert len(tree.path) == 5001


OPENAI = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "What time"}, {"type": "text", "text": "is it?"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "12:00", "tool_call_id": "call_1"},
    {"role": "assistant", "content": "Noon."},
]
OPENAI_TOLD = [
    ("system", "Be brief."), ("user", "What time\nis it?"), ("assistant", ""), ("tool", "12:00"),
    ("assistant", "Noon."),
]  # fmt: skip


@pytest.mark.parametrize("form", ["list", "request", "many", "lines"])
def test_openai_s_messages(form: str):
    request = {"model": "gpt-x", "messages": OPENAI, "temperature": 0}
    documents = {"list": OPENAI, "request": request, "many": [request, request]}
    text = "\n".join([json.dumps(request)] * 2) if form == "lines" else json.dumps(documents[form], indent=2)
    imported = read("\ufeff" + text)
    assert imported.source == "OpenAI's messages"
    assert [told(tree) for tree in imported.trees] == [OPENAI_TOLD] * (2 if form in ("many", "lines") else 1)
    tree = imported.trees[0]
    assert tree.conversation.title == "What time"
    assert tree.told()[2]["tool_calls"] == [CALL]
    assert tree.told()[3]["tool_call_id"] == "call_1"


def test_what_other_programs_add_to_a_call_stays_behind():
    """The server would refuse it, and the conversation could not go on."""
    call = CALL | {"index": 0, "extra": {}, "function": CALL["function"] | {"parsed": {}}}
    (tree,) = read(json.dumps([*OPENAI[:2], OPENAI[2] | {"tool_calls": [call]}, *OPENAI[3:]])).trees
    assert tree.told()[2]["tool_calls"] == [CALL]


def test_pictures_in_openai_s_messages_are_counted():
    parts = [{"type": "image_url", "image_url": {}}, {"type": "text", "text": "What is this?"}]
    imported = read(json.dumps([{"role": "user", "content": parts}]))
    assert told(imported.trees[0]) == [("user", "What is this?")]
    assert imported.notes == ("left out: 1 × content of the type 'image_url'",)


def test_sharegpt():
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    wanted = [("user", "Hi"), ("assistant", "Hello.")]
    many = [{"id": "x", "conversations": turns}, {"conversations": turns, "system": "Be kind."}]
    imported = read(json.dumps(many))
    assert imported.source == "ShareGPT"
    assert [told(tree) for tree in imported.trees] == [wanted, [("system", "Be kind."), *wanted]]
    assert told(read(json.dumps(turns)).trees[0]) == wanted
    with pytest.raises(RequestError, match=r"\[0\]\.conversations\[0\]\.from is \"robot\", expected one of system"):
        read(json.dumps([{"conversations": [{"from": "robot", "value": "x"}]}]))


def test_a_file_of_save():
    saved = {
        "version": 1, "model": "demo", "system": "s", "params": {"temperature": 0},
        "messages": [{"role": "user", "content": "q"},
                     {"role": "assistant", "content": "a", "finish_reason": "length"}],
    }  # fmt: skip
    imported = read(json.dumps(saved))
    (tree,) = imported.trees
    assert imported.source == "a file of /save"
    assert told(tree) == [("system", "s"), ("user", "q"), ("assistant", "a")]
    assert tree.conversation.settings == {"system": "s", "sampling": {"temperature": 0}}
    assert tree.path[-1].extra == {"finish_reason": "length"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "neither JSON nor our Markdown"),
        ("# Notes\n\nMilk, bread", "neither JSON nor our Markdown"),
        ("{", "neither JSON nor our Markdown"),
        ('{\n"messages": [\n', "is not JSON: Expecting value: line 3"),
        ("[]", "holds no conversations"),
        ("null", "holds a JSON NoneType, in which no conversation is known"),
        ('{"name": 1, "age": 2}', "holds an object with age, name, in which no conversation is known"),
        ('[{"name": 1}]', r"\[0\] is an object with name"),
        ('{"messages": []}', r"messages is \[\], expected one message or more"),
        ('{"messages": [{"role": "user", "content": NaN}]}', "NaN is not JSON"),
        ('[{"role": "user", "content": 5}]', r"\[0\]\.content is 5, expected a list"),
        ('{"messages": [{"role": "user", "content": "x"}]}\n{"messages":', "line 2"),
        ("[" * 100_000, "nested too deeply"),
        ("<!-- qwenlet conversation {} ", "line 1 is damaged"),
        ('<!-- qwenlet conversation {"version": 1} -->', "title is null, expected text"),
        ('<!-- qwenlet conversation {"version": 1, -->', "line 1 is damaged"),
    ],
)
def test_what_is_no_conversation_is_refused_with_words(text: str, said: str):
    with pytest.raises(RequestError, match=said):
        read(text, "notes.txt")


words = st.sampled_from(
    ["role", "content", "messages", "conversations", "from", "value", "mapping", "message", "author", "parts", "parent",
     "text", "type", "user", "assistant", "system", "human", "format", "version", "qwenlet.conversations", "title",
     "id", "tool_calls", "params", "current_node", "create_time", "content_type", "tool", "created", "extra"]
)  # fmt: skip
wild = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | words | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=6),
    max_leaves=25,
)


@pytest.fixture(scope="module")
def long_lived(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Store.open(tmp_path_factory.mktemp("store") / "history.sqlite3") as opened:
        yield opened


@given(st.one_of(wild, st.lists(st.dictionaries(words, wild), max_size=3)), st.sampled_from(["", "\n{}", "x"]))
def test_wild_documents_are_read_or_refused(long_lived: Store, document: Any, tail: str):
    try:
        imported = read(json.dumps(document) + tail)
    except QwenletError:
        return
    for talk in long_lived.adopt(imported.trees):
        assert long_lived.tree(talk.id).told() is not None
