"""Temporary names beside what is being written, and what a process that was killed has left under them."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from glob import escape
from pathlib import Path

# A process of another machine that shares the folder can't be asked whether it runs, so its files have to be this old:
# writers add to them every few minutes at the latest.
_OLD = 3600.0


def partial_path(out: Path) -> Path:
    """Where this process writes what shall become `out`."""
    return out.with_name(f".{out.name}.partial-{os.getpid()}")


def remove_left(folder: Path, name: str | None = None) -> None:
    """Removes what killed processes left of files and folders called `name` in `folder`, of any name if that is None:
    gigabytes that nothing else would find."""
    for path in folder.glob(f".{'*' if name is None else escape(name)}.partial-*"):
        pid = path.name.rpartition("-")[2]
        with suppress(OSError):  # another process may be removing it, too
            if not pid.isdecimal() or _runs(int(pid)) or time.time() - _touched(path) < _OLD:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def _touched(path: Path) -> float:
    """When it was last written to, by time.time()."""
    return max(part.stat().st_mtime for part in (path, *(path.iterdir() if path.is_dir() else ())))


def _runs(pid: int) -> bool:
    if os.name == "nt":  # where signal 0 is no question
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
