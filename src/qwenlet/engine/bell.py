"""How the engine's thread tells event loops of new chunks: one wake-up of each loop for a whole step."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass


class Bell:
    """Wakes one event loop. What rings before the loop looked is told with one wake-up."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._told: deque[Callable[[], None]] = deque()
        self._ringing = False

    def ring(self, told: Iterable[Callable[[], None]]) -> None:
        """Has the loop call each of `told`; from any thread."""
        self._told.extend(told)
        loop = self._loop()
        if self._ringing or loop is None:
            return
        self._ringing = True
        with suppress(RuntimeError):  # the loop was closed before its streams
            loop.call_soon_threadsafe(self._answer)

    def _answer(self) -> None:
        self._ringing = False  # first, so that whoever comes after the last look rings again
        while self._told:
            self._told.popleft()()


class AtOnce:
    """For readers without an event loop: what it is told is called in the engine's thread, so it has to be quick."""

    def ring(self, told: Iterable[Callable[[], None]]) -> None:
        for call in told:
            call()


_bells: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Bell] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def bell() -> Bell:
    """The one of the loop that runs here."""
    loop = asyncio.get_running_loop()
    with _making:
        if loop not in _bells:
            _bells[loop] = Bell(loop)
        return _bells[loop]


@dataclass(frozen=True)
class Listener:
    """Who waits for a request's chunks: what its loop calls when there are some."""

    bell: Bell | AtOnce
    tell: Callable[[], None]


def tell(listeners: Iterable[Listener]) -> None:
    """Rings each loop's bell once."""
    waiting: dict[Bell | AtOnce, list[Callable[[], None]]] = {}
    for listener in listeners:
        waiting.setdefault(listener.bell, []).append(listener.tell)
    for each, told in waiting.items():
        each.ring(told)
