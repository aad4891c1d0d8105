"""What tests of the sandbox share: skip with the kernel's reason where there can't be one, and the host's side."""

from __future__ import annotations

import os
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from qwenlet.errors import SandboxError
from qwenlet.evals import sandbox
from qwenlet.evals.sandbox import Limits, Outcome

QUICK = Limits(wall_seconds=20.0, cpu_seconds=5, memory_bytes=256 << 20)


def need_sandbox() -> None:
    try:
        sandbox.check()
    except SandboxError as error:
        pytest.skip(f"no sandbox on this machine: {error.message}")


def box(program: str, **limits: float) -> Outcome:
    return sandbox.run(textwrap.dedent(program), replace(QUICK, **limits))  # type: ignore[arg-type]


def processes_saying(mark: str) -> list[int]:
    """Pids of the machine's processes that have `mark` in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if mark.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found
