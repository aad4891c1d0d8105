"""Bodies that nobody would send: each gets an answer that is meant, and the server goes on."""

from __future__ import annotations

from typing import Any

import msgspec
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
