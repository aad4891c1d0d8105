"""Files within a question: `@notes.txt` adds the text of that file below it.

`@@` is a plain @. What names no file and looks like none (@everyone) stays text.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from qwenlet.cli import console
from qwenlet.errors import RequestError

MAX_BYTES = 1_000_000  # many times what a context holds; more is a mistake
# at the beginning of a word, up to white space or a closing sign; quotes hold names with spaces
_MENTION = re.compile(r"""(?<!\S)@(?:@|"(?P<quoted>[^"\n]+)"|(?P<bare>[^\s"@][^\s"]*))""")
_BEGUN = re.compile(r"""(?<!\S)@(?:"([^"\n]*)|([^\s"@][^\s"]*)?)$""")
_TRAILING = ",;:!?)]}>.，。；：！？）"


def expand(question: str) -> str:
    """The question with the files it mentions below it.

    Raises RequestError for a file that can't be read as text, and for a name of one line that looks like a file's but
    is none; in a text of several lines, such as a paste, that stays text and is said.
    """
    paths: list[Path] = []
    pasted = "\n" in question.strip()

    def look(match: re.Match[str]) -> str:
        if match[0] == "@@":
            return "@"
        name = match["quoted"] or match["bare"]
        path = _existing(name) if match["quoted"] else _existing(name) or _existing(name.rstrip(_TRAILING))
        if path is not None and (path.is_file() or not pasted):
            paths.append(path)
        elif match["quoted"] or _looks_like_a_file(name):
            if not pasted:
                raise RequestError(f"there is no file {name}", hint="write @@ for an @ that names no file")
            console.note(f"@{name} is no file, so it stays text")
        return match[0]

    return attach(_MENTION.sub(look, question), paths)


def attach(question: str, paths: Sequence[Path]) -> str:
    """The question, and below it each file under its name, in a fence. Raises RequestError for what is no text."""
    parts = [question] if question else []
    left = MAX_BYTES
    for path in dict.fromkeys(paths):
        text = _text(path, left)
        left -= len(text.encode())
        console.note(f"attached {path}, {console.size(len(text.encode()))}")
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        parts.append(f"{path}:\n{fence}\n{text}\n{fence}")
    return "\n\n".join(parts)


def begun(text: str) -> str | None:
    """The file name that is being typed at the end of a text, if one is."""
    match = _BEGUN.search(text)
    return None if match is None else match[1] or match[2] or ""


def _existing(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path if name and path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, no home
        return None


def _looks_like_a_file(name: str) -> bool:
    name = name.rstrip(_TRAILING)
    return name.startswith(("~/", "./", "../", "/")) or bool(re.fullmatch(r"[\w./\\-]*\w\.\w{1,8}", name))


def _text(path: Path, left: int) -> str:
    try:
        # asked before it is opened: opening a pipe would wait for its writer
        if not stat.S_ISREG(path.stat().st_mode):
            raise RequestError(f"{path} is no plain file, so it can't be attached")
        with path.open("rb") as file:
            raw = file.read(left + 1)
            size = max(os.fstat(file.fileno()).st_size, len(raw))
    except OSError as problem:
        raise RequestError(f"can't read {path}: {problem.strerror}") from None
    if len(raw) > left:
        raise RequestError(
            f"{path} has {console.size(size)}, and a question takes files of {console.size(MAX_BYTES)} in all",
            hint="attach the part that matters",
        )
    if b"\0" in raw:
        raise RequestError(f"{path} is binary, and the model reads text alone")
    return console.decode(raw, str(path)).rstrip("\n")
