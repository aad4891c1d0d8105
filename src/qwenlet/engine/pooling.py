"""Hidden states become one vector, piece by piece."""

from __future__ import annotations

from torch import Tensor


class MeanState:
    """The mean of a prompt's last hidden states, normed; a reader of `Engine.read`."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def __call__(self, position: int, hidden: Tensor) -> None:
        """Takes in hidden states [n, C] of the positions from `position` on; each once, if a request began anew."""
        # in float64 the sum does not depend on where the prompt was cut into pieces
        fresh = hidden[max(self._count - position, 0) :].double()
        if len(fresh):
            self._sum = fresh.sum(0) if self._sum is None else self._sum + fresh.sum(0)
            self._count += len(fresh)

    @property
    def mean(self) -> Tensor:
        """Float32 [C] on the CPU."""
        assert self._sum is not None, "to be asked when the request has ended"
        return (self._sum / self._count).float().cpu()
