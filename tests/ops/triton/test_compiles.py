"""What the interpreter does not show: that every kernel compiles for GPUs that aren't here, and into what."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[3]
ASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"


def compiled(capability: int, cache: Path) -> list[dict[str, Any]]:
    """In a process of its own, as this one has Triton as an interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "tests.ops.triton.compiling", str(capability)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(not ASSEMBLER.exists(), reason="this triton brings no assembler")
def test_for_hopper(tmp_path: Path) -> None:
    found = compiled(90, tmp_path)
    kernels = {one["kernel"] for one in found}
    assert kernels == {
        "float_row", "codes_row", "float_rows", "codes_rows", "unpack", "_attend", "_embed",
        "_penalize", "_weigh", "_choose", "_uniform",
    }  # fmt: skip
    for one in found:
        assert one["spilled"] == 0, one
        assert one["shared"] <= 227 << 10, one
        if one["kernel"] in ("float_row", "codes_row", "float_rows", "codes_rows", "_attend"):
            assert one["wide_loads"] > 0, one


@pytest.mark.skipif(not ASSEMBLER.exists(), reason="this triton brings no assembler")
def test_for_turing_in_float16(tmp_path: Path) -> None:
    for one in compiled(75, tmp_path):
        assert one["shared"] <= 64 << 10, one
