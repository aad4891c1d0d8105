"""A reply on its way to the terminal: text as it comes, progress while the prompt is read, Ctrl-C as a request to stop.

Plain text only: Markdown is not laid out.
"""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from qwenlet import tools
from qwenlet.cli import console
from qwenlet.tools import Call, Event, ReplyParser, Text

if TYPE_CHECKING:
    from qwenlet.engine import Chunk
    from qwenlet.engine.records import Timings

# a prompt that takes longer than this to read gets a progress bar
PREFILL_PATIENCE_S = 1.0


@dataclass(frozen=True)
class Reply:
    """What was shown. `last` is the last chunk, with counts and timings; None if there was none.

    Attributes:
        calls, thought: what a reply that may call tools has beside its text.
    """

    text: str
    finish_reason: str
    last: Chunk | None
    calls: tuple[Call, ...] = ()
    thought: str = ""


class _Stop:
    requested = False


@contextmanager
def stop_on_interrupt() -> Iterator[_Stop]:
    """The first Ctrl-C only sets a flag, so that a step of the engine is never torn apart; a second one interrupts."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def show(chunks: Iterator[Chunk], out: TextIO | None, parser: ReplyParser | None = None) -> Reply:
    """Writes the text of `chunks` to `out`, if there is one, as it comes, with a line break at the end.

    With a `parser` only what it takes for text is written, and the reply ends where it wants no more.

    Control characters are left out where `out` is a terminal. Ctrl-C ends the reply with what there is of it, and
    closing the iterator tells the engine; errors pass through after the line is ended.
    """
    clean = console.printable if console.is_terminal(out) else str
    parts: list[str] = []
    events: list[Event] = []
    last: Chunk | None = None
    complete = False

    def write(text: str) -> None:
        if text:
            progress.close()
            parts.append(text)
            if out is not None:
                out.write(clean(text))
                out.flush()

    def read(new: list[Event]) -> str:
        events.extend(new)
        return "".join(event.text for event in new if isinstance(event, Text))

    with console.Progress("tokens", PREFILL_PATIENCE_S) as progress:
        try:
            with stop_on_interrupt() as stop:
                for chunk in chunks:
                    last = chunk
                    if chunk.text:
                        write(chunk.text if parser is None else read(parser.push(chunk.text)))
                    elif chunk.prompt_done < chunk.prompt_tokens:
                        progress.update(chunk.prompt_done, chunk.prompt_tokens, "reading the prompt")
                    if stop.requested or (parser is not None and parser.done):
                        break
        except KeyboardInterrupt:
            pass  # the second Ctrl-C: what there is of the reply is kept all the same
        finally:
            getattr(chunks, "close", lambda: None)()
            if parser is not None:
                complete = parser.done
                cut = not complete and (last is None or last.finish_reason != "stop")
                write(read(parser.finish(cut=cut)))
            if out is not None and parts and not parts[-1].endswith("\n"):
                out.write("\n")
                out.flush()
    finished = last.finish_reason if last is not None else None
    if parser is None:
        return Reply("".join(parts), finished or "cancelled", last)
    said = tools.Reply.from_events(events)
    if complete:
        finished = "stop"  # a call was whole, or the reply went on to what is not its own to say
    return Reply(said.text, finished or "cancelled", last, said.calls, said.thought)


def timings(of: Timings) -> dict[str, Any]:
    """Timings with their rates, for JSON."""
    rates = ("prefill_tokens_per_second", "decode_tokens_per_second")
    return dataclasses.asdict(of) | {rate: getattr(of, rate) for rate in rates}


def stats_line(chunk: Chunk) -> str:
    """Counts and speed of a reply, in one line."""
    t = chunk.timings
    parts = [f"{chunk.prompt_tokens} prompt tokens", f"{chunk.completion_tokens} new"]
    if t.time_to_first_token is not None:
        parts.append(f"first token after {t.time_to_first_token:.2f} s")
    for name, rate in (("prefill", t.prefill_tokens_per_second), ("decode", t.decode_tokens_per_second)):
        if rate is not None:
            parts.append(f"{name} {rate:.1f} tokens/s")
    return "; ".join([*parts, f"seed {chunk.seed}", f"finish reason {chunk.finish_reason or 'cancelled'}"])
