"""Results kept while something is computed for the first time, and given back while it is computed again.

Gradient checkpointing runs a block twice: once for its result, and once more for what its gradient needs. Within the
two contexts of a `Tape` the first run keeps what goes through `once`, and the second run gets it back instead of
computing it. Neither run asks Python about each operator, as torch's selective checkpointing does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token

from torch import Tensor

_tape: ContextVar[Tape | None] = ContextVar("tape", default=None)


class Tape:
    """What one run kept, in its order.

    Use: `with tape.keeping: f()`, later `with tape.giving: f()`, any number of times.
    """

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._next: int | None = None  # None: keeps

    # made when asked for: held by the tape they would hold it in turn, and so all it kept until a garbage collection
    @property
    def keeping(self) -> AbstractContextManager[None]:
        """On during the first run."""
        return _On(self, gives=False)

    @property
    def giving(self) -> AbstractContextManager[None]:
        """On during a second run; may be entered again."""
        return _On(self, gives=True)

    def start(self, gives: bool) -> None:
        """Begins a run."""
        self._next = 0 if gives else None
        if not gives:
            self._kept.clear()

    def once(self, compute: Callable[[], Tensor]) -> Tensor:
        """As the function below."""
        if self._next is None:
            result = compute()
            # without its gradient's graph, which holds this tape
            self._kept.append(result.detach())
            return result
        assert self._next < len(self._kept), f"the first run kept {len(self._kept)} results, this one asks for more"
        self._next += 1
        return self._kept[self._next - 1].detach()


class _On(AbstractContextManager[None]):
    """Makes a tape the one that `once` asks."""

    def __init__(self, tape: Tape, gives: bool) -> None:
        self._tape, self._gives = tape, gives
        self._tokens: list[Token[Tape | None]] = []

    def __enter__(self) -> None:
        self._tape.start(self._gives)
        self._tokens.append(_tape.set(self._tape))

    def __exit__(self, *_: object) -> None:
        _tape.reset(self._tokens.pop())


def active() -> bool:
    """Whether a tape is on."""
    return _tape.get() is not None


def once(compute: Callable[[], Tensor]) -> Tensor:
    """`compute()`, or what it gave in the first run; to be called where no graph is recorded, as in the forward pass
    of an autograd.Function. Without a tape it is computed."""
    tape = _tape.get()
    return compute() if tape is None else tape.once(compute)
