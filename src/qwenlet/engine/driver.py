"""The thread that steps an engine: sleeps while there is nothing to do, and shows that it lives."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from dataclasses import dataclass
from typing import Protocol

_IDLE_SECONDS = 1.0  # between two heartbeats of an engine without work


class Steps(Protocol):
    """What is driven."""

    @property
    def busy(self) -> bool: ...

    def step(self) -> bool: ...

    def died(self, error: BaseException) -> None: ...


@dataclass(frozen=True)
class Health:
    """Whether the engine does its work.

    Attributes:
        reason: of the latest failed step, while steps keep failing.
        beat_seconds: since the thread last showed itself: a step takes seconds at most; None: it was never started.
    """

    healthy: bool
    reason: str = ""
    beat_seconds: float | None = None


class Driver:
    """Holds the engine weakly: one that nobody else holds any more ends its thread."""

    def __init__(self, engine: Steps) -> None:
        self._engine = weakref.ref(engine)
        self._wake = threading.Condition()
        self._work = False
        self._thread: threading.Thread | None = None
        self._beat: float | None = None
        self.draining = self.closed = False
        _drivers.add(self)

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def beat_seconds(self) -> float | None:
        return None if self._beat is None else time.monotonic() - self._beat

    def start(self) -> None:
        with self._wake:
            if self._thread is None and not self.closed:
                self._thread = threading.Thread(target=_run, args=(self,), name="qwenlet-engine", daemon=True)
                self._thread.start()

    def wake(self) -> None:
        with self._wake:
            self._work = True
            self._wake.notify_all()

    def drain(self, timeout: float | None) -> bool:
        self.draining = True
        self.start()
        deadline = None if timeout is None else time.monotonic() + timeout
        while (engine := self._engine()) is not None and engine.busy and self.alive:
            if deadline is not None and time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def close(self) -> None:
        self.closed = True
        self.wake()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def wait(self) -> bool:
        """Until there may be work; False when the thread is to end."""
        with self._wake:
            if not self._work and not self.closed:
                self._wake.wait(_IDLE_SECONDS)
            self._work = False
        self.beat()
        return not self.closed

    def beat(self) -> None:
        self._beat = time.monotonic()


def _run(driver: Driver) -> None:
    while driver.wait():
        engine = driver._engine()
        if engine is None:
            return
        try:
            while not driver.closed and engine.step():
                driver.beat()
        except BaseException as error:
            driver.closed = True
            engine.died(error)
            raise
        del engine


# a thread in native code when the interpreter ends would take the process down
_drivers: weakref.WeakSet[Driver] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for driver in list(_drivers):
        driver.close()
