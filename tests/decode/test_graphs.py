"""Recording, with a stand-in for CUDA: the step runs while it is warmed up and recorded, and never as Python again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from qwenlet.decode.graphs import Eager, Graphs, graphs_for

GPU = torch.device("cuda")


class FakeStream:
    def __init__(self, *_: object) -> None:
        self.waited: list[object] = []

    def wait_stream(self, other: object) -> None:
        self.waited.append(other)


class FakeGraph:
    replays = 0

    def replay(self) -> None:
        self.replays += 1

    def pool(self) -> str:
        return "the pool"


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What graphs were recorded with."""
    seen: list[dict[str, Any]] = []
    current = FakeStream()

    @contextmanager
    def recording(graph: FakeGraph, **options: Any) -> Iterator[None]:
        seen.append({"graph": graph, **options})
        yield

    @contextmanager
    def on(stream: FakeStream) -> Iterator[None]:
        yield

    for name, value in {
        "Stream": FakeStream, "CUDAGraph": FakeGraph, "graph": recording, "stream": on,
        "current_stream": lambda *_: current,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return seen


def test_a_step_is_warmed_up_recorded_once_and_replayed(recorded: list[dict[str, Any]]) -> None:
    runs: list[int] = []
    replay = Graphs(GPU).record(lambda: runs.append(len(recorded)))
    assert runs == [0, 0, 1]  # twice before the recording, once in it
    replay()
    replay()
    assert len(runs) == 3
    assert recorded[0]["graph"].replays == 2


def test_graphs_share_their_memory(recorded: list[dict[str, Any]]) -> None:
    graphs = Graphs(GPU)
    for _ in range(3):
        graphs.record(lambda: None)
    assert [entry["pool"] for entry in recorded] == [None, "the pool", "the pool"]


def test_a_cpu_runs_the_step_itself() -> None:
    runs: list[int] = []
    graphs = graphs_for(torch.device("cpu"))
    assert isinstance(graphs, Eager)
    replay = graphs.record(lambda: runs.append(1))
    assert not runs
    replay()
    assert runs == [1]
