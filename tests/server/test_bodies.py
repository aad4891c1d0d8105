"""What is known of a body before anything is built of it."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlet.server.bodies import MAX_NESTED, decoded, nesting
from qwenlet.server.errors import ApiError
from qwenlet.store.parsed import depth
from server.conftest import Server

texts = st.text('[]{}"\\\\a\u00e9\n', max_size=8)
values = st.recursive(
    texts | st.integers(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=30,
)


def count(value: Any) -> int:
    if not isinstance(value, (list, dict)):
        return 0
    return 1 + sum(map(count, value.values() if isinstance(value, dict) else value))


@given(values, st.booleans())
def test_nesting_is_that_of_the_values(value: Any, ascii: bool) -> None:
    """Brackets within strings are none, wherever quotes and backslashes stand."""
    raw = json.dumps(value, ensure_ascii=ascii).encode()
    assert nesting(raw) == (count(value), depth(value))


@pytest.mark.parametrize("raw", [b"", b'"', b"]]]", b'{"a": "', b"\\", b"[" * 1_000_000])
def test_no_json_is_measured_too(raw: bytes) -> None:
    assert nesting(raw) == (raw.count(b"[") + raw.count(b"{"),) * 2


def test_too_many_parts_are_refused_before_they_are_built() -> None:
    decoder = msgspec.json.Decoder()
    assert len(decoded(b"[" + b"[]," * (MAX_NESTED - 2) + b"[]]", decoder)) == MAX_NESTED - 1
    with pytest.raises(ApiError, match="lists and objects"):
        decoded(b"[" + b"[]," * MAX_NESTED + b"[]]", decoder)


def test_large_bodies_hold_nobody_up(server: Server) -> None:
    """Well-formed ones of eight megabytes, and more tokens than any context has."""
    hostile = [
        ("/v1/chat/completions", b'{"messages": [], "tool_choice": [' + b"[]," * 2_600_000 + b"1]}"),
        ("/v1/chat/completions", b'{"messages": [' + b'{"role":"user","content":""},' * 99_000 + b'{"role":""}]}'),
        ("/detokenize", b'{"tokens": [' + b"7," * 3_900_000 + b"7]}"),
        ("/v1/completions", b'{"prompt": [' + b"7," * 3_900_000 + b"7]}"),
        ("/v1/embeddings", b'{"input": [' + b"7," * 3_900_000 + b"7]}"),
    ]
    for path, raw in hostile:
        sending = threading.Thread(target=server.call, args=("POST", path, raw))
        sending.start()
        waits = []
        while sending.is_alive():
            began = time.perf_counter()
            assert server.call("GET", "/version").status == 200
            waits.append(time.perf_counter() - began)
        assert max(waits) < 1.0, path
