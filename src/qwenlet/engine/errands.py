"""Work on the model that is no reply: it runs in the engine's thread, one piece between two steps."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

Result = TypeVar("Result")


class Errands:
    """A queue that any thread may fill."""

    def __init__(self) -> None:
        self._waiting: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()

    def __bool__(self) -> bool:
        return not self._waiting.empty()

    def add(self, work: Callable[[], Result]) -> Future[Result]:
        future: Future[Result] = Future()
        self._waiting.put((work, future))
        return future

    def run_one(self) -> bool:
        """Whether there was one. What it raises is its own caller's."""
        try:
            work, future = self._waiting.get_nowait()
        except Empty:
            return False
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)
        return True

    def drop(self, error: Exception) -> None:
        """Ends all that wait."""
        while self:
            _, future = self._waiting.get_nowait()
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
