"""What a killed process left is removed; what somebody may be writing is not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwenlet.checkpoint import new_folder
from qwenlet.checkpoint.partial import partial_path
from qwenlet.checkpoint.save import new_file
from qwenlet.checkpoint.tilefile import TileWriter


@pytest.fixture(scope="module")
def dead() -> int:
    """The id of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        return child.pid


def left(folder: Path, name: str, *, hours: float = 2.0) -> Path:
    """A half-written folder of that name; the folder is as old as its file."""
    path = folder / name
    path.mkdir()
    (path / "shard-0").write_bytes(b"half")
    then = time.time() - 3600 * hours
    for part in (path / "shard-0", path):
        os.utime(part, (then, then))
    return path


def test_the_next_writer_to_the_same_place_removes_it(tmp_path: Path, dead: int) -> None:
    stale = left(tmp_path, f".out.partial-{dead}")
    file = tmp_path / f".x.gguf.partial-{dead}"
    file.write_bytes(b"half")
    os.utime(file, (0, 0))
    kept = [
        left(tmp_path, f".other.partial-{dead}"),
        left(tmp_path, f".out.partial-{os.getppid()}"),
        left(tmp_path, ".out.partial-mine"),
    ]
    with new_folder(tmp_path / "out") as folder:
        assert folder == partial_path(tmp_path / "out")
        assert not stale.exists()
        assert file.exists(), "of another place"
    with new_file(tmp_path / "x.gguf") as work:
        work.touch()
    assert not file.exists()
    assert all(path.exists() for path in kept)


def test_what_another_machine_may_be_writing_stays(tmp_path: Path, dead: int) -> None:
    fresh = left(tmp_path, f".out.partial-{dead}")
    os.utime(fresh / "shard-0")  # a shard is growing
    with new_folder(tmp_path / "out"):
        pass
    assert fresh.exists()


def test_the_cache_of_tiles_is_cleared_whatever_model_comes_next(tmp_path: Path, dead: int) -> None:
    stale = tmp_path / f".some-model.tiles.partial-{dead}"
    stale.write_bytes(b"half")
    os.utime(stale, (0, 0))
    with TileWriter(tmp_path / "another.tiles", {}):
        assert not stale.exists()
