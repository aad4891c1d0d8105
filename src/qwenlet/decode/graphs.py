"""Recording a step and replaying it. On a CPU there is nothing to record: the step runs as Python each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

_WARM_UPS = 2  # runs before recording: kernels are compiled and libraries take their workspaces


class Replay(Protocol):
    def __call__(self) -> None: ...


class Eager:
    """Runs a step as it is."""

    def record(self, step: Callable[[], None]) -> Replay:
        return step


class Graphs:
    """CUDA graphs that share their memory: one runs at a time, and what it wrote is read before the next."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None

    def record(self, step: Callable[[], None]) -> Replay:
        """`step` must launch the same kernels on the same buffers each time, and wait for nothing."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                step()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # other threads may allocate or copy meanwhile
        with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
            step()
        self._pool = self._pool or graph.pool()
        return graph.replay


def graphs_for(device: torch.device) -> Eager | Graphs:
    return Graphs(device) if device.type == "cuda" else Eager()
