"""What is kept between calls: whose it is, and what clients are told where it can't be kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwenlet.store import Store
from server.conftest import Server, running

ONE, TWO = {"authorization": "Bearer sk-one"}, {"authorization": "Bearer sk-two"}
BODY = {"input": "What is the capital of France?", "temperature": 0, "max_output_tokens": 2}


@pytest.fixture(scope="module")
def shared(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("QWENLET_DATA", str(tmp_path_factory.mktemp("shared")))
        with running(demo_gguf, "--quiet", "--api-key", "sk-one", "--api-key", "sk-two") as server:
            yield server


def test_a_key_finds_its_own_responses_alone(shared: Server) -> None:
    made = shared.call("POST", "/v1/responses", BODY, **ONE)
    assert made.status == 200, made.raw
    id = made.json["id"]
    where = f"/v1/responses/{id}"
    for method, path in (
        ("GET", where),
        ("GET", f"{where}/input_items"),
        ("DELETE", where),
        ("POST", f"{where}/cancel"),
    ):
        other = shared.call(method, path, **TWO)
        assert (other.status, other.error["code"]) == (404, "response_not_found"), path
    for path in ("/v1/responses", "/v1/responses/input_tokens"):
        body = {"input": "And of Italy?", "previous_response_id": id}
        other = shared.call("POST", path, body, **TWO)
        assert (other.status, other.error["code"]) == (400, "previous_response_not_found")
        assert shared.call("POST", path, body, **ONE).status == 200
    assert shared.call("GET", where, **ONE).json == made.json  # nothing of that has touched it
    assert shared.call("DELETE", where, **ONE).status == 200


def test_what_the_other_may_not_is_answered_as_what_is_not_there(shared: Server) -> None:
    """Who asks for ids at random learns nothing from the answers."""
    id = shared.call("POST", "/v1/responses", BODY, **ONE).json["id"]
    there = shared.call("GET", f"/v1/responses/{id}", **TWO)
    nowhere = shared.call("GET", "/v1/responses/resp_nowhere", **TWO)
    assert there.status == nowhere.status
    assert there.error["message"].replace(id, "resp_nowhere") == nowhere.error["message"]


@pytest.mark.parametrize("key", ["sk-onf", "sk-on", "sk-one1", "Sk-one", "sk-one\u00e9", "sk-one,sk-two", "", "*"])
def test_a_key_that_is_nearly_right(shared: Server, key: str) -> None:
    for headers in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}):
        answer = shared.call("POST", "/v1/responses", BODY, **headers)
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
        assert not key or key not in answer.error["message"]


@pytest.mark.parametrize("way", ["--no-history", "QWENLET_NO_HISTORY"])
def test_without_history_nothing_reaches_the_disk(
    demo_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """A response goes on from another all the same, as long as the server runs."""
    monkeypatch.setenv("QWENLET_DATA", str(tmp_path))
    if not way.startswith("--"):
        monkeypatch.setenv(way, "1")
    with running(demo_gguf, "--quiet", *([way] if way.startswith("--") else ())) as server:
        first = server.call("POST", "/v1/responses", BODY)
        assert first.json["store"] is True
        id = first.json["id"]
        assert server.call("POST", "/v1/responses", BODY | {"previous_response_id": id}).status == 200
        assert server.call("GET", f"/v1/responses/{id}").json == first.json
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------------- no store


def check_that_only_keeping_fails(server: Server, data: Path) -> None:
    """What needs the store says so, without places or traces; everything else is served."""
    calls: list[tuple[str, str, Any]] = [
        ("POST", "/v1/responses", BODY),
        ("POST", "/v1/responses", BODY | {"stream": True}),
        ("GET", "/v1/responses/resp_1", None),
        ("DELETE", "/v1/responses/resp_1", None),
        ("POST", "/v1/responses", BODY | {"previous_response_id": "resp_1"}),
        ("GET", "/page/api/conversations", None),
        ("POST", "/page/api/conversations", {}),
        ("GET", "/page/api/export", None),
    ]
    for method, path, body in calls:
        answer = server.call(method, path, body)
        assert (answer.status, answer.error["code"]) == (500, "store"), path
        assert "can't be read or written" in answer.error["message"]
        for inside in (b"Traceback", b"sqlite", str(data).encode()):
            assert inside not in answer.raw
    assert server.call("POST", "/v1/responses", BODY | {"store": False}).status == 200
    assert server.chat(max_tokens=1).status == 200
    assert server.call("GET", "/health").status == 200


def test_a_damaged_file_is_told_and_left_as_it_is(
    demo_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWENLET_DATA", str(tmp_path))
    file = tmp_path / "history.sqlite3"
    file.write_text("dear diary, " * 500)
    with running(demo_gguf, "--quiet") as server:
        check_that_only_keeping_fails(server, tmp_path)
    assert {one.name for one in tmp_path.iterdir()} == {file.name}
    assert file.read_text() == "dear diary, " * 500


def test_a_file_that_may_only_be_read(demo_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for root, who may do what permissions forbid unless that right is taken away."""
    monkeypatch.setenv("QWENLET_DATA", str(tmp_path))
    with Store.open(tmp_path / "history.sqlite3") as store:
        store.new_conversation("old")
    (tmp_path / "history.sqlite3").chmod(0o400)
    before: list[str] = []
    if os.geteuid() == 0:
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            pytest.skip("root may write everything, and setpriv is not there to change that")
        before = [setpriv, "--bounding-set=-dac_override"]
    with running(demo_gguf, "--quiet", before=before) as server:
        check_that_only_keeping_fails(server, tmp_path)


def test_a_file_that_breaks_meanwhile(demo_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables go away under an open server: each call says so, and the server goes on."""
    monkeypatch.setenv("QWENLET_DATA", str(tmp_path))
    with running(demo_gguf, "--quiet") as server:
        assert server.call("POST", "/v1/responses", BODY).status == 200
        with Store.open(tmp_path / "history.sqlite3") as store, store._write() as db:
            db.execute("DROP TABLE responses")
        answer = server.call("POST", "/v1/responses", BODY)
        assert (answer.status, answer.error["code"]) == (500, "store")
        events = server.call("POST", "/v1/responses", BODY | {"stream": True}).raw.decode()
        assert "event: response.failed" in events
        assert "no such table" not in events
        assert server.chat(max_tokens=1).status == 200
