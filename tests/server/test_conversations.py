"""The page as files, and the door to the store that it alone may use."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwenlet.config import ServerConfig
from qwenlet.server.page import STATIC, paths
from qwenlet.server.service import Service
from server.conftest import Answer, Server, running

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def keyed(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One key, and a limit that the page's own calls must not count against."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("QWENLET_DATA", str(tmp_path_factory.mktemp("keyed")))
        with running(demo_gguf, "--quiet", "--api-key", "secret", "--max-per-minute", "1") as one:
            yield one


def get(server: Server, path: str, **headers: str) -> Any:
    answer = server.call("GET", f"/page/api/{path}", **headers)
    assert answer.status == 200, answer.raw
    return answer.json


def post(server: Server, path: str, body: Any, **headers: str) -> Any:
    answer = server.call("POST", f"/page/api/{path}", body, **headers)
    assert answer.status == 200, answer.raw
    return answer.json


# ---------------------------------------------------------------------------------------------------------- files


def test_every_file_is_sent_with_a_strict_policy(server: Server) -> None:
    assert "/" in paths()
    for path, file in paths().items():
        answer = server.call("GET", path)
        assert answer.status == 200
        assert answer.raw == file.read_bytes()
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        lasting = "immutable" in answer.headers["cache-control"]
        assert lasting == path.startswith("/page/assets/")


def test_files_are_small_and_asked_for_once(server: Server) -> None:
    plain = server.call("GET", "/")
    small = server.call("GET", "/", **{"accept-encoding": "gzip, br"})
    assert small.headers["content-encoding"] == "gzip"
    assert gzip.decompress(small.raw) == plain.raw
    again = server.call("GET", "/", **{"if-none-match": plain.headers["etag"]})
    assert (again.status, again.raw) == (304, b"")
    assert server.call("GET", "/page/../server/run.py").status == 404
    assert server.call("GET", "/page/nothing.js").status == 404


def test_the_page_keeps_to_its_size() -> None:
    sizes = [len(gzip.compress(path.read_bytes())) for path in STATIC.rglob("*") if path.is_file()]
    assert sum(sizes) <= 400_000


def test_the_page_names_nothing_elsewhere() -> None:
    """Addresses in the built page are names of vocabularies and pages of documentation in error messages."""
    known = re.compile(
        r"https?://(www\.w3\.org/|github\.com/|goo\.gl|katex\.org|developer\.mozilla\.org|preactjs\.com)"
    )
    for path in STATIC.rglob("*"):
        if path.suffix in (".js", ".css", ".html"):
            for found in re.findall(r"https?://[\w./-]+", path.read_text(encoding="utf-8")):
                assert known.match(found), f"{path.name}: {found}"


# ---------------------------------------------------------------------------------------------------------- the door


def held(current: str | None, *messages: tuple[str, str | None], **extra: Any) -> Any:
    """What a page without history sends, of (id, parent) each."""
    talk = {"id": "c", "title": "", "model": "", "current": current, "created": 0.0, "updated": 0.0, "settings": {}}
    said = {"role": "user", "content": "a", "created": 0.0, "extra": extra}
    return {"conversations": [{"conversation": talk, "messages": [{"id": a, "parent": b} | said for a, b in messages]}]}


def test_a_conversation_lives(server: Server) -> None:
    made = post(server, "conversations", {"settings": {"system": "Be brief.", "sampling": {"top_p": 0.5}}})
    where = f"conversations/{made['id']}"
    question = post(server, f"{where}/messages", {"role": "user", "content": "What is a zephyrine?"})
    assert get(server, where)["conversation"]["title"] == "What is a zephyrine?"
    reply = post(server, f"{where}/messages", {"role": "assistant", "content": "A w", "parent": question["id"]})
    post(server, f"messages/{reply['id']}", {"content": "A wind.", "extra": {"finish_reason": "length"}})
    other = post(server, f"{where}/messages", {"role": "user", "content": "What is a sirocco?"})
    tree = get(server, where)
    assert tree["conversation"]["current"] == other["id"]
    assert [one["content"] for one in tree["messages"]] == ["What is a zephyrine?", "A wind.", "What is a sirocco?"]
    assert tree["messages"][1]["extra"] == {"finish_reason": "length"}
    changed = post(server, where, {"current": question["id"], "title": "Winds", "settings": {}})
    assert (changed["current"], changed["title"], changed["settings"]) == (reply["id"], "Winds", {})
    assert made["id"] in [one["id"] for one in get(server, "conversations?limit=5")]
    assert [one["message"] for one in get(server, "search?text=zephyr")] == [question["id"]]
    assert "A wind." in server.call("GET", f"/page/api/{where}/export?form=markdown").raw.decode()
    post(server, f"{where}/delete", {})
    gone = server.call("GET", f"/page/api/{where}")
    assert (gone.status, gone.error["code"]) == (404, "not_found")
    assert server.call("POST", f"/page/api/messages/{reply['id']}", {"content": "", "extra": {}}).status == 404


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("conversations", {"settings": []}),
        ("conversations", {"model": "another"}),
        ("conversations", b"{"),
        ("conversations/conv_1/messages", {"role": "root", "content": ""}),
        ("import", b"\xff"),
        ("import", b"{}"),
        ("read", b"[]"),
        ("render?form=pdf", {"conversations": []}),
        ("render?form=markdown", held("1", ("1", "1"))),  # its own parent
        ("render?form=markdown", held("1", ("1", "2"), ("2", "1"))),
        ("render?form=markdown", held("3", ("1", None))),
        ("render", held("1", ("1", None), ("1", None))),
        ("render?form=markdown", held("1", ("1", None), tool_calls=1)),
        ("conversations/conv_1/messages", {"role": "assistant", "content": "", "extra": {"tool_calls": [{"id": []}]}}),
        ("messages/msg_1", {"content": "", "extra": {"tool_calls": {}}}),
        ("read", b'[{"role": "user", "content": "a", "tool_call_id": "\\ud800"}, {"role": "\\ud800"}]'),
    ],
)
def test_what_is_no_conversation_is_refused(server: Server, path: str, body: Any) -> None:
    answer = server.call("POST", f"/page/api/{path}", body)
    assert answer.status == 400
    assert answer.error["message"]


def test_numbers_are_numbers(server: Server) -> None:
    for bad in ("-1", "x", "1e9", "9" * 30):
        assert server.call("GET", f"/page/api/conversations?limit={bad}").status == 400


def test_other_sites_may_not(server: Server) -> None:
    def asked(**headers: str) -> Answer:
        return server.call("GET", "/page/api/conversations", **headers)

    here = f"http://127.0.0.1:{server.port}"
    assert asked(origin=here).status == 200
    assert asked(origin=here, **{"sec-fetch-site": "same-origin"}).status == 200
    for headers in (
        {"origin": "https://elsewhere.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"sec-fetch-site": "cross-site"},
        {"origin": here, "sec-fetch-site": "same-site"},
        {"host": "elsewhere.example"},
    ):
        answer = asked(**headers)
        assert (answer.status, answer.error["type"]) == (403, "permission_error"), headers
    posted = server.call("POST", "/page/api/conversations", {}, origin="https://elsewhere.example")
    assert posted.status == 403


def test_the_page_is_open_and_conversations_are_not(keyed: Server) -> None:
    assert keyed.call("GET", "/").status == 200
    for path in ("about", "conversations", "search?text=a", "export"):
        assert keyed.call("GET", f"/page/api/{path}").status == 401
    key = {"authorization": "Bearer secret"}
    assert get(keyed, "about", **key)["history"] is True
    for _ in range(3):  # more than the limit of the model's requests
        post(keyed, "conversations", {}, **key)


def test_about_says_what_is_in_force(server: Server) -> None:
    about = get(server, "about")
    model = about["model"]
    assert (about["state"], about["history"], model["name"], model["precision"]) == ("ready", True, "demo", "bf16")
    assert model["sampling"]["temperature"] == 0.0
    assert model["temperature_if_cut"] == 1.0
    assert model["context_length"] == 8192


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ({}, True),
        ({"history": False}, False),
        ({"api_key": ["a"]}, True),
        ({"api_key": ["a", "b"]}, False),  # they would read each other's
        ({"host": "0.0.0.0", "api_key": ["a"]}, True),
        ({"host": "0.0.0.0", "insecure": True}, False),
    ],
)
def test_a_history_has_one_reader(config: dict[str, Any], kept: bool) -> None:
    assert Service("demo", ServerConfig(**config)).keeps_history is kept


def test_the_environment_turns_the_history_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENLET_NO_HISTORY", "1")
    assert Service("demo", ServerConfig()).keeps_history is False


def test_chat_continues_what_the_page_began(server: Server, demo_gguf: Path) -> None:
    made = post(server, "conversations", {"settings": {"system": "Be brief."}})
    assert made["model"] == str(demo_gguf)


# ---------------------------------------------------------------------------------------------------------- --web


def test_web_opens_the_browser_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwenlet.cli import web

    shown: list[str] = []
    started: list[Any] = []

    def start(model: str, config: ServerConfig, loading: Any, engine: Any, *, quiet: bool, listening: Any) -> None:
        started.append((model, config))
        listening(f"http://127.0.0.1:{config.port}")

    monkeypatch.setattr(web.serve, "start", start)
    monkeypatch.setattr(web.webbrowser, "open", lambda address: shown.append(address) or True)
    monkeypatch.setattr(web.threading, "Thread", lambda target, daemon: SimpleNamespace(start=target))
    web.talk("demo", {}, {}, history=False)
    (model, config) = started[0]
    assert (model, config.host, config.history) == ("demo", "127.0.0.1", False)
    assert shown == [f"http://127.0.0.1:{config.port}"]


def test_web_takes_no_flags_that_the_page_has_itself() -> None:
    command = [sys.executable, "-m", "qwenlet", "chat", "--web", "--temperature", "0.5", "--stats"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "the page has its own --stats, --temperature" in done.stderr


def test_the_lock_file_is_of_the_page() -> None:
    """What was built is what the sources name: `scripts/page --check` builds it again where node is there."""
    wanted = json.loads((ROOT / "web" / "package.json").read_text())["devDependencies"]
    locked = json.loads((ROOT / "web" / "package-lock.json").read_text())["packages"]
    assert {name: locked[f"node_modules/{name}"]["version"] for name in wanted} == wanted
