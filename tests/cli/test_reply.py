"""Streaming to a terminal: what is shown, what Ctrl-C leaves, what the progress line does."""

from __future__ import annotations

import io
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.fake import TIMINGS
from qwenlet.cli import console, reply
from qwenlet.engine.records import Chunk


def chunk(text, *, done=10, new=1, reason=None):
    return Chunk(text, (7,) * new, reason, 10, done, new, 5, TIMINGS)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@given(st.text())
def test_nothing_printable_controls_the_terminal(text):
    shown = console.printable(text)
    assert all(c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f") for c in shown)
    shown.encode("utf-8")
    assert console.printable(shown) == shown


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_closes_the_stream_and_keeps_the_text(presses):
    closed = []

    def chunks():
        try:
            yield chunk("half ")
            for _ in range(presses):
                signal.raise_signal(signal.SIGINT)
            yield chunk("a reply")
            yield chunk(" too much")
        finally:
            closed.append(True)

    out, before = io.StringIO(), signal.getsignal(signal.SIGINT)
    shown = reply.show(chunks(), out)
    assert shown.finish_reason == "cancelled"
    assert shown.text == ("half a reply" if presses == 1 else "half ")
    assert out.getvalue() == shown.text + "\n"
    assert closed == [True]
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_ends_the_line_and_passes_through():
    def chunks():
        yield chunk("half")
        raise RuntimeError("the bug")

    out = io.StringIO()
    with pytest.raises(RuntimeError):
        reply.show(chunks(), out)
    assert out.getvalue() == "half\n"


def test_progress_while_a_long_prompt_is_read(monkeypatch):
    updates = []
    monkeypatch.setattr(console.Progress, "update", lambda self, *values: updates.append(values))
    reply.show(
        iter([chunk("", done=4, new=0), chunk("", done=8, new=0), chunk("hi"), chunk("", reason="stop")]), io.StringIO()
    )
    assert updates == [(4, 10, "reading the prompt"), (8, 10, "reading the prompt")]


@pytest.mark.parametrize(
    ("stream", "delay", "visible"), [(Terminal, 0, True), (Terminal, 60, False), (io.StringIO, 0, False)]
)
def test_the_progress_line_is_for_people_who_wait(monkeypatch, stream, delay, visible):
    stderr = stream()
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    console.stderr.cache_clear()
    with console.Progress("tokens", delay) as progress:
        progress.update(1, 2, "read\x1bing")
    console.stderr.cache_clear()
    assert ("reading" in stderr.getvalue()) == visible
    assert bool(stderr.getvalue()) == visible
