"""How the command line speaks: messages and progress on stderr, errors without tracebacks, text in and out.

rich and typer are imported where they are needed, so that the error of a mistyped verb costs no more than its line.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TextIO

from qwenlet.errors import QwenletError, RequestError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from typer import Typer

FAILURE, USAGE, INTERRUPTED = 1, 2, 130
_STEPS_SECONDS = 600.0

# C0 without tab and newline, DEL, C1: what could move the cursor, hide text or talk to the terminal
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """The text without control characters other than newline and tab, and without halves of surrogate pairs."""
    return _CONTROLS.sub("", text).encode("utf-8", "replace").decode("utf-8")


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person is on the other end; False for a stream that is missing or closed."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


# -------------------------------------------------------------------------------------------------------- messages


@functools.cache
def stderr() -> Console:
    """The console for people. NO_COLOR and terminals without colour are honoured by rich."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def message(text: str = "", style: str | None = None, end: str = "\n") -> None:
    """One message on stderr."""
    if sys.stderr is None:  # closed by the caller; print would turn to stdout, which is for data
        return
    if style is None:
        print(printable(text), end=end, file=sys.stderr)
    else:
        stderr().print(printable(text), style=style, end=end)


def note(text: str) -> None:
    """A message that explains, set apart from the model's words where the terminal can."""
    message(text, style="dim")


def error(text: str, hint: str | None = None) -> None:
    """`error: ...`, and what to do next on a second line."""
    message("error: ", style="bold red", end="")
    message(text)
    if hint is not None:
        message("hint: ", style="bold", end="")
        message(hint)


def run(load_app: Callable[[], Typer], verb: str, arguments: Sequence[str]) -> int:
    """Runs the typer app of a verb; a failure becomes a message and an exit code, with QWENLET_DEBUG=1 a traceback."""
    import typer

    usage_error = typer.BadParameter.__mro__[2]  # the base of all parse errors, which typer doesn't export
    program = f"qwenlet {verb}"
    if sys.stdout is None:
        error("stdout is closed, so there is nowhere to write to")
        return FAILURE
    _prepare_streams()
    try:
        code = load_app()(list(arguments), prog_name=program, standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        message()
        return INTERRUPTED
    except BrokenPipeError:
        # the reader has left (`| head`); the interpreter must not complain when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except Exception as problem:
        if isinstance(problem, usage_error):
            error(problem.format_message(), hint=f"{program} --help")  # type: ignore[attr-defined]
            return USAGE
        return explain(problem)


def leave() -> NoReturn:
    """Ends the process while a thread is in native code, which would take an interpreter that ends down with it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # missing or closed
            stream.flush()
    os._exit(0)


def explain(problem: Exception) -> int:
    """Shows any error as one message and returns the exit code."""
    if os.environ.get("QWENLET_DEBUG") == "1":
        raise problem
    if isinstance(problem, QwenletError):
        error(problem.message, problem.hint)
    elif isinstance(problem, OSError):
        error(str(problem))
    else:
        error(
            f"this should not have happened: {type(problem).__name__}: {problem}",
            hint="run it again with QWENLET_DEBUG=1 to see where, and report it",
        )
    return FAILURE


def _prepare_streams() -> None:
    """Files and pipes get UTF-8; a terminal that can't show a character gets a question mark instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper):
            continue
        if is_terminal(stream):
            stream.reconfigure(errors="replace")
        else:
            stream.reconfigure(encoding="utf-8")


def size(count: int) -> str:
    """Bytes for people: 4,096 -> '4.1 kB', in powers of 1000 as file managers and hubs count."""
    value, units = float(count), iter(("bytes", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while value >= 1000 and unit != "TB":
        value, unit = value / 1000, next(units)
    return f"{count} bytes" if unit == "bytes" else f"{value:.1f} {unit}"


# -------------------------------------------------------------------------------------------------------- progress


class Progress:
    """A line on stderr that appears only on a terminal and only for what takes longer than `delay` seconds.

    Call `update(done, total, what)` as often as you like; the line is gone after `close()`.
    """

    def __init__(self, unit: Literal["bytes", "tokens", "steps"] = "bytes", delay: float = 0.5) -> None:
        self._unit = unit
        self._shown_from = time.monotonic() + delay
        self._bar: RichProgress | None = None
        self._task: Any = None

    def update(self, done: int, total: int, what: str) -> None:
        if self._bar is None:
            if time.monotonic() < self._shown_from or not is_terminal(sys.stderr):
                return
            self._bar = self._new_bar()
            self._task = self._bar.add_task(printable(what), completed=done, total=total or None)
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total or None, description=printable(what))

    def close(self) -> None:
        self._shown_from = math.inf  # also for a thread that goes on
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _new_bar(self) -> RichProgress:
        from rich import progress

        amount: list[progress.ProgressColumn] = [progress.MofNCompleteColumn()]
        if self._unit == "bytes":
            amount = [progress.DownloadColumn(), progress.TransferSpeedColumn(), progress.TimeRemainingColumn()]
        elif self._unit == "steps":
            amount = [progress.TaskProgressColumn(), progress.TimeRemainingColumn()]
        text = progress.TextColumn("{task.description}", markup=False)
        # steps differ in length, so the time left is judged by many of them
        period = _STEPS_SECONDS if self._unit == "steps" else 30.0
        return progress.Progress(
            text, progress.BarColumn(), *amount, console=stderr(), transient=True, speed_estimate_period=period
        )


# ------------------------------------------------------------------------------------------------------- text in


def ask(question: str) -> str:
    """One line typed after a question; empty at the end of input. Raises KeyboardInterrupt for Ctrl-C."""
    message(question, style="bold", end="")
    stderr().file.flush()
    line = sys.stdin.readline() if sys.stdin is not None else ""
    if not line.endswith("\n"):
        message()
    return line


def decode(raw: bytes, source: str) -> str:
    """UTF-8 text, with the place of the first bad byte in the error; a byte order mark is dropped."""
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as problem:
        raise RequestError(
            f"{source} is not valid UTF-8: {problem.reason}, byte 0x{raw[problem.start]:02x} at offset {problem.start}",
            hint="convert it first, for example with: iconv -f GB18030 -t UTF-8",
        ) from None


def check_text(text: str, source: str) -> str:
    """Returns the text if it is one: a terminal or a command line may have passed bytes that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as problem:
        code = ord(text[problem.start])
        seen = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"half of a surrogate pair U+{code:04X}"
        raise RequestError(f"{source} is not valid UTF-8: {seen} after {problem.start} characters") from None
    return text


def piped_text() -> str | None:
    """What is piped into stdin, without its last line break; None where stdin is a terminal or closed."""
    if sys.stdin is None or is_terminal(sys.stdin):
        return None
    return _without_last_newline(decode(sys.stdin.buffer.read(), "stdin"))


def file_text(path: Path) -> str:
    """A text file without its last line break. Raises RequestError where it can't be read."""
    try:
        raw = path.read_bytes()
    except OSError as problem:
        raise RequestError(f"can't read {path}: {problem.strerror}") from None
    return _without_last_newline(decode(raw, str(path)))


def _without_last_newline(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")
