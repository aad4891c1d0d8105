"""Bodies that nobody would send: each gets an answer that is meant, and the server goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenlet.server.app import REQUESTS
from server.conftest import Server

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/completions": {"prompt": "a"},
    "/v1/embeddings": {"input": "a"},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [5]},
}
NAMES = {path: [field.encode_name for field in msgspec.structs.fields(kind)] for path, kind in REQUESTS}


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A good body with one to three fields that are anything."""
    path = draw(st.sampled_from(sorted(GOOD)))
    changed = draw(st.dictionaries(st.sampled_from(NAMES[path]), VALUES, min_size=1, max_size=3))
    short = {"max_tokens": 1} if "max_tokens" in NAMES[path] else {}
    return path, GOOD[path] | short | changed


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(bodies(), st.integers(0, 10**6))
def test_any_fields(server: Server, case: tuple[str, dict[str, Any]], cut: int) -> None:
    path, body = case
    answer = server.call("POST", path, body)
    assert answer.status in (200, 400, 404), answer.raw
    if answer.status != 200:
        assert answer.error
    raw = msgspec.json.encode(GOOD[path])
    cut_short = server.call("POST", path, raw[: cut % len(raw)])
    assert cut_short.status == 400
    assert server.call("GET", "/ready").status == 200


def test_hundreds_of_wild_bodies(qwen_vocab: Path) -> None:
    """To every endpoint that takes a body: the program that sends thousands, over a small model of random weights."""
    program = Path(__file__).parents[2] / "benchmarks" / "fuzz_server.py"
    command = [sys.executable, str(program), "--tiny", str(qwen_vocab), "--count", "600", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=290)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["bodies"], told["trouble"], told["failed_steps"]) == (600, 0, 0)
    statuses = {int(name.split()[1]) for name in told["statuses"]}
    assert {200, 400, 404} <= statuses <= {200, 400, 404, 413, 503}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/api/chat", "/v1/messages"])
@pytest.mark.parametrize("digits", [20, 400, 5000])
def test_numbers_of_any_length(server: Server, path: str, digits: int) -> None:
    """In fields that are known and in some that are not: an answer that is meant, and an engine that goes on."""
    good = {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    if path == "/api/chat":
        whole = json.dumps(good | {"stream": False, "options": {"num_predict": 1, "top_k": 0}})
    else:
        whole = json.dumps(good | {"max_tokens": 1, "top_k": 0})
    number = "1" + "0" * digits
    for raw in (whole.replace('"top_k": 0', f'"top_k": {number}'), f'{whole[:-1]}, "nothing": {number}}}'):
        answer = server.call("POST", path, raw.encode())
        assert answer.status in (200, 400), answer.raw
    for name in ("temperature", "seed", "presence_penalty"):
        wrong = whole.replace('"top_k": 0', f'"top_k": 0, "{name}": {number}')
        assert server.call("POST", path, wrong.encode()).status in (200, 400)
    assert server.chat(max_tokens=1).status == 200


def test_nesting_has_its_limit(server: Server) -> None:
    """Deep enough for any schema; what is deeper would break what walks it, now or when it is read again."""
    path, body = "/page/api/conversations", '{"settings": %s1%s}'
    good = server.call("POST", path, (body % ('{"a":' * 150, "}" * 150)).encode())
    assert good.status == 200, good.raw
    for deep in (250, 900, 100_000):
        bad = server.call("POST", path, (body % ('{"a":' * deep, "}" * deep)).encode())
        assert bad.status == 400
        assert bad.error["message"]
    wide = server.call("POST", path, {"settings": {"a": [[]] * 5000}})
    assert wide.status == 200
    assert server.call("GET", path).status == 200
    whole = server.call("GET", f"/page/api/conversations/{good.json['id']}/export")
    assert server.call("POST", "/page/api/import", whole.raw).status == 200
    tree = whole.json
    for _ in range(300):
        tree["conversations"][0]["settings"] = {"a": tree["conversations"][0]["settings"]}
    refused = server.call("POST", "/page/api/import", tree)
    assert (refused.status, "nested too deeply" in refused.error["message"]) == (400, True)
