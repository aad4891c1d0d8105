"""Bytes of a file that are mapped at once, and soon lie in large pages of memory at the same addresses."""

from __future__ import annotations

import gc
import os
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwenlet.checkpoint import moving
from qwenlet.checkpoint.mapped import mapped_bytes
from qwenlet.ops.memory import LARGE_PAGE

OFFERED, REFUSED = "always [madvise] never", "always madvise [never]"
SIZE = 3 * LARGE_PAGE + 5000  # pieces of a large page, the last one shorter

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is moved on Linux only")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(torch.arange(SIZE // 4 + 2000, dtype=torch.int32).numpy().tobytes())
    return path


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Large pages are offered, and little is worth moving, in many pieces."""
    monkeypatch.setattr(moving, "_LEAST", 1)
    monkeypatch.setattr(moving, "_PIECE", LARGE_PAGE)
    path = tmp_path / "enabled"
    path.write_text(OFFERED)
    return path


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Lets pieces through, one for each release."""
    semaphore, move = threading.Semaphore(0), moving._move_piece

    def waiting(*args) -> None:
        semaphore.acquire()
        move(*args)

    monkeypatch.setattr(moving, "_move_piece", waiting)
    return semaphore


def movers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == moving.THREAD]


def settle() -> None:
    for thread in movers():
        thread.join(60)
        assert not thread.is_alive()


def backing(data: Tensor) -> list[str]:
    """Of each large page's worth of the tensor: what is mapped there, a path or nothing."""
    spans = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, _, *name = line.split(maxsplit=5)
        begin, end = (int(side, 16) for side in span.split("-"))
        spans.append((begin, end, name[0] if name else ""))
    places = range(data.data_ptr() + 4096, data.data_ptr() + data.nbytes, LARGE_PAGE)
    return [next(name for begin, end, name in spans if begin <= place < end) for place in places]


@linux
@pytest.mark.parametrize("offset", [0, 404, 4096])
def test_moved_bytes_are_the_file(file, setting, offset):
    expected = mapped_bytes(file, offset, SIZE).clone()
    data = moving.moving_bytes(file, offset, SIZE, spare=0, setting=setting)
    assert torch.equal(data, expected)  # wherever they are by now
    settle()
    assert torch.equal(data, expected)
    assert backing(data) == [""] * 4


@linux
def test_pieces_move_one_after_the_other_and_addresses_stay(file, setting, gate):
    data = moving.moving_bytes(file, 0, SIZE, spare=0, setting=setting)
    address, expected = data.data_ptr(), mapped_bytes(file, 0, SIZE).clone()
    assert backing(data) == [str(file)] * 4
    assert moving.memory_to_come() == SIZE
    for _ in range(4):
        gate.release()
    settle()
    assert moving.memory_to_come() == 0
    assert (data.data_ptr(), backing(data)) == (address, [""] * 4)
    assert torch.equal(data, expected)


@linux
def test_a_reader_sees_the_same_bytes_throughout(file, setting):
    expected = int(mapped_bytes(file, 0, SIZE).view(torch.uint8).sum())
    for _ in range(20):
        data = moving.moving_bytes(file, 0, SIZE, spare=0, setting=setting)
        while movers():
            assert int(data.sum()) == expected
        assert int(data.sum()) == expected


@linux
def test_who_lets_go_ends_the_moving_and_the_mapping(file, setting, gate):
    data = moving.moving_bytes(file, 0, SIZE, spare=0, setting=setting)
    part = data[-100:]
    del data
    gate.release()
    assert int(part[-1]) == int(mapped_bytes(file, 0, SIZE)[-1])  # a slice keeps all of it
    assert movers()
    del part
    gc.collect()
    gate.release()  # the piece that had begun, perhaps
    settle()
    assert str(file) not in Path("/proc/self/maps").read_text()


@linux
def test_a_file_that_becomes_shorter_meanwhile_stays_mapped(file, setting, gate):
    data = moving.moving_bytes(file, 0, SIZE, spare=0, setting=setting)
    begin = data[: 2 * LARGE_PAGE].clone()
    os.truncate(file, 2 * LARGE_PAGE)
    for _ in range(4):
        gate.release()
    settle()
    assert backing(data)[:2] == ["", ""]
    assert backing(data)[2] == str(file)
    assert torch.equal(data[: 2 * LARGE_PAGE], begin)


@linux
def test_memory_that_is_refused_leaves_the_file_mapped(file, setting, monkeypatch):
    def refuse(*_: object) -> int:
        raise OSError("no memory")

    monkeypatch.setattr(moving._System, "large_pages", refuse)
    data = moving.moving_bytes(file, 0, SIZE, spare=0, setting=setting)
    settle()
    assert backing(data) == [str(file)] * 4


@linux
def test_a_piece_that_cant_be_put_in_place_is_mapped_again(file, setting, monkeypatch):
    def lose(system: moving._System, at: int, size: int, to: int) -> None:
        system.unmap(to, size)  # as the system leaves it where it fails late
        raise OSError("no memory")

    monkeypatch.setattr(moving._System, "move", lose)
    data = moving.moving_bytes(file, 404, SIZE, spare=0, setting=setting)
    settle()
    assert torch.equal(data, mapped_bytes(file, 404, SIZE))
    assert backing(data) == [str(file)] * 4


def test_little_stays_mapped(tmp_path, file):
    path = tmp_path / "enabled"
    path.write_text(OFFERED)
    data = moving.moving_bytes(file, 0, SIZE, spare=0, setting=path)
    assert not movers()
    assert torch.equal(data, mapped_bytes(file, 0, SIZE))


@pytest.mark.parametrize(("text", "free"), [(REFUSED, 1 << 40), (OFFERED, SIZE + (1 << 30) - 1), (OFFERED, None)])
def test_without_such_pages_or_room_files_stay_mapped(file, setting, monkeypatch, text, free):
    setting.write_text(text)
    monkeypatch.setattr(moving, "available_memory", lambda: free)
    for known in (setting, setting.parent / "nowhere"):
        data = moving.moving_bytes(file, 0, SIZE, setting=known)
        assert not movers()
        assert torch.equal(data, mapped_bytes(file, 0, SIZE))


@linux
def test_a_file_that_ends_early(file, setting):
    with pytest.raises(OSError, match="can't be mapped"):
        moving.moving_bytes(file, 0, file.stat().st_size + 1, spare=0, setting=setting)
    assert not movers()


@linux
def test_addresses_that_are_refused_leave_an_ordinary_mapping(file, setting, monkeypatch):
    def refuse(*_: object) -> int:
        raise OSError("no addresses")

    monkeypatch.setattr(moving._System, "reserve", refuse)
    data = moving.moving_bytes(file, 404, SIZE, spare=0, setting=setting)
    assert not movers()
    assert torch.equal(data, mapped_bytes(file, 404, SIZE))


@linux
def test_a_second_mapping_counts_what_the_first_will_take(file, setting, gate, monkeypatch):
    monkeypatch.setattr(moving, "available_memory", lambda: 2 * SIZE - 1)
    first = moving.moving_bytes(file, 0, SIZE, spare=0, setting=setting)
    second = moving.moving_bytes(file, 0, SIZE, spare=0, setting=setting)
    assert len(movers()) == 1
    for _ in range(4):
        gate.release()
    settle()
    assert backing(first) == [""] * 4
    assert backing(second) == [str(file)] * 4


@linux
def test_a_forked_child_waits_for_no_mover(file, setting, gate):
    data = moving.moving_bytes(file, 0, SIZE, spare=0, setting=setting)
    child = os.fork()
    if not child:
        os._exit(moving.memory_to_come() != 0 or int(data[-1]) != int(mapped_bytes(file, 0, SIZE)[-1]))
    assert os.waitpid(child, 0)[1] == 0
    assert moving.memory_to_come() == SIZE
    for _ in range(4):
        gate.release()
    settle()
