"""What all calls share: the model and its names, and how much room there is."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwenlet.config import ServerConfig, is_loopback
from qwenlet.errors import ConfigError
from qwenlet.llm import LLM
from qwenlet.server.errors import RETRY_SECONDS, ApiError, busy
from qwenlet.server.limits import Limits
from qwenlet.store import Store, is_off

State = Literal["loading", "ready", "draining"]
LEFT = 499  # nginx's status of a client that left before there was an answer
_STUCK_SECONDS = 120.0  # a step takes seconds; a thread that shows itself no more does not come back


@dataclass(frozen=True)
class Client:
    """Who calls.

    Attributes:
        name: whose limits count: a key's number, or an address.
        owner: whose things are kept; all who show no key share theirs.
    """

    name: str
    owner: str = ""


class Service:
    """One model and its clients. All of it but `store` belongs to the event loop's thread.

    Attributes:
        own_names: under which clients ask for the model; answers carry the first.
        state: "loading" until `open`.
        answers: how many went out, by status, those that had no reader any more as LEFT.
    """

    def __init__(self, name: str, config: ServerConfig) -> None:
        self.config = config
        # the last part of a path: clients need not learn where files lie
        own = (Path(name).name if _is_path(name) else name,)
        self.own_names: tuple[str, ...] = tuple(config.served_name or ()) or own
        self.state: State = "loading"
        self.created = int(time.time())
        self._llm: LLM | None = None
        self._outstanding = 0
        self._store: Store | None = None
        self._opening = threading.Lock()
        self.limits = Limits(config)
        self.answers: Counter[int] = Counter()

    def open(self, llm: LLM) -> None:
        """From now on there is a model. Raises ConfigError where an adapter has one of the model's own names."""
        if twice := sorted(set(self.own_names) & set(llm.adapters)):
            raise ConfigError(
                f"{twice[0]!r} names the model and an adapter", hint="give one of them another name (--served-name)"
            )
        self._llm, self.state = llm, "ready"

    @property
    def llm(self) -> LLM:
        """Raises ApiError 503 while there is none yet."""
        if self._llm is None:
            retry = {"retry-after": str(RETRY_SECONDS)}
            raise ApiError(503, "the model is being loaded", "server_error", code="loading", headers=retry)
        return self._llm

    @property
    def keeps_history(self) -> bool:
        """Whether the page's conversations are kept: they are one person's, so whoever calls has to be that person."""
        config = self.config
        alone = is_loopback(config.host) and not config.allowed_host
        return self.writes_history and len(config.api_key or ()) <= 1 and (bool(config.api_key) or alone)

    @property
    def writes_history(self) -> bool:
        """Whether anything of what people say may reach the disk."""
        return self.config.history and not is_off()

    @property
    def store(self) -> Store:
        """What is kept between calls, as long as the server runs where no history is written; for threads beside the
        event loop. Raises StoreError."""
        with self._opening:
            if self._store is None:
                opened = Store.open() if self.writes_history else Store.open_in_memory()
                try:
                    opened.expire_responses()
                except BaseException:
                    opened.close()
                    raise
                self._store = opened
            return self._store

    def close(self) -> None:
        with self._opening:
            if self._store is not None:
                self._store.close()
                self._store = None

    @property
    def names(self) -> tuple[str, ...]:
        """All that clients may ask for: the model under its own names, and each adapter beside it."""
        return self.own_names + (() if self._llm is None else self._llm.adapters)

    def adapter(self, name: str | None) -> str | None:
        """The adapter that clients mean by a model's name; None: the model alone."""
        plain = None if name is None else name.removesuffix(":latest")  # Ollama's clients add it
        return next((one for one in self.llm.adapters if one in (name, plain)), None)

    def called(self, name: str | None) -> str:
        """What answers call the model that was asked for."""
        return self.adapter(name) or self.own_names[0]

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 for a model that isn't here; None means the one that is."""
        if name is not None and name not in self.own_names and name not in self.llm.adapters:
            raise ApiError(
                404,
                f"the model {name!r:.200} is not loaded; this server has {', '.join(map(repr, self.names))}",
                "not_found_error",
                param="model",
                code="model_not_found",
            )

    @contextmanager
    def room(self, client: Client, requests: int, param: str = "n") -> Iterator[None]:
        """Holds places for so many engine requests of one call, which itself counts as one of the client's replies.

        A call takes at most half of the places that are free, or a single one, so that others find some left.

        Args:
            param: the field to blame for more than any call may have.
        Raises:
            ApiError: 400 for more than that; 503 where the queue is too full; 429 where the client has too many.
        """
        most = int(min(max(self._places // 2, 1), self.limits.most))
        if requests > most:
            words = f"the call asks for {requests} replies at once, and {most} of one call have room"
            raise ApiError(400, words, param=param)
        if requests > self._half or self._outstanding >= self._places:
            words = f"{self._outstanding} requests run or wait, and {self._places} have room"
            raise busy(words if requests == 1 else f"{words}, of which one call takes at most half of what is left")
        with self.limits.running(client.name, requests - 1):
            self._outstanding += requests
            try:
                yield
            finally:
                self._outstanding -= requests

    def share(self, client: Client) -> int:
        """Places for a call whose work can be done in slices: as many as run at once, as far as it may have them."""
        left = self.limits.left(client.name) + 1  # the call is counted already
        return int(max(min(self.llm.options.max_requests, self._half, left), 1))

    @property
    def _places(self) -> int:
        return self.llm.options.max_requests + self.config.max_queue

    @property
    def _half(self) -> int:
        """Most places that one call may take now, where there are any."""
        return max((self._places - self._outstanding) // 2, 1)

    @property
    def outstanding(self) -> int:
        return self._outstanding

    def trouble(self, *, in_full: bool = False) -> str | None:
        """Why the engine does not do its work; None if it does, or has nothing to do yet.

        Args:
            in_full: with the error's own words, which are for those alone who have a key.
        """
        if self._llm is None:
            return None
        health = self._llm.engine.health
        if not health.healthy:
            if health.reason and not in_full:
                return "the engine's steps fail; the server's log says where"
            return health.reason or "the engine was shut down"
        if self._llm.engine.busy and health.beat_seconds is not None and health.beat_seconds > _STUCK_SECONDS:
            return f"the engine has not finished a step for {health.beat_seconds:.0f} s"
        return None


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or Path(name).exists()
