"""Memory in which the programs of one launch hand each other partial results."""

from __future__ import annotations

import torch
from torch import Tensor


class Scratch:
    """Partial sums, and counters by which the last program of a launch knows that it is the last.

    Launches on one stream may share one; each leaves the counters at 0. Two streams need two.

    Attributes:
        partials: [floats] float32, whatever is in it.
        counters: [counters] int32, all 0 between launches.
    """

    def __init__(self, device: torch.device | str, floats: int = 1 << 22, counters: int = 1 << 14) -> None:
        self.partials: Tensor = torch.empty(floats, dtype=torch.float32, device=device)
        self.counters: Tensor = torch.zeros(counters, dtype=torch.int32, device=device)
