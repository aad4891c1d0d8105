"""How much one client may ask for: replies at a time, requests a minute, tokens a minute."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from qwenlet.config import ServerConfig
from qwenlet.server.errors import RETRY_SECONDS, ApiError

_MOST_BUCKETS = 10_000  # of clients that are remembered; more are forgotten once they have all that is theirs again


@dataclass
class Bucket:
    """What is left, at a moment; it comes back evenly. Below zero is what a client owes."""

    left: float
    at: float


class Allowance:
    """So much a minute of each client.

    Args:
        kind: of what, as clients' headers name it.
    """

    def __init__(self, kind: str, rate: int) -> None:
        self.kind, self.rate = kind, rate
        self._per_second = rate / 60
        self._buckets: dict[str, Bucket] = {}

    def spend(self, client: str, count: float) -> None:
        bucket = self._filled(client)
        bucket.left -= count
        if len(self._buckets) > _MOST_BUCKETS:
            now = time.monotonic()
            self._buckets = {name: one for name, one in self._buckets.items() if not self._is_full(one, now)}

    def check(self, client: str, needed: float) -> None:
        """Raises ApiError 429 where so much is not left."""
        left = self._filled(client).left
        if left < needed:
            wait = math.ceil((needed - left) / self._per_second)
            limit = f"{self.rate} {self.kind} a minute of this client"
            raise _too_many(limit, wait, self.told(client))

    def told(self, client: str) -> dict[str, str]:
        """Headers that say what is left."""
        left = self._filled(client).left
        return {
            f"x-ratelimit-limit-{self.kind}": str(self.rate),
            f"x-ratelimit-remaining-{self.kind}": str(max(int(left), 0)),
            f"x-ratelimit-reset-{self.kind}": f"{(self.rate - left) / self._per_second:.3f}s",
        }

    def _filled(self, client: str) -> Bucket:
        now = time.monotonic()
        bucket = self._buckets.setdefault(client, Bucket(self.rate, now))
        bucket.left = min(bucket.left + (now - bucket.at) * self._per_second, float(self.rate))
        bucket.at = now
        return bucket

    def _is_full(self, bucket: Bucket, now: float) -> bool:
        return bucket.left + (now - bucket.at) * self._per_second >= self.rate


class Limits:
    """Counts by client: a key, or an address where there are no keys."""

    def __init__(self, config: ServerConfig) -> None:
        self._at_once = config.max_concurrent
        self._running: Counter[str] = Counter()
        self._requests = _allowance("requests", config.max_per_minute)
        self._tokens = _allowance("tokens", config.max_tokens_per_minute)

    def take(self, client: str) -> None:
        """Counts one request. Raises ApiError 429 where none is left, or tokens of earlier ones are owed."""
        if self._tokens is not None:
            self._tokens.check(client, 1.0)
        if self._requests is not None:
            self._requests.check(client, 1.0)
            self._requests.spend(client, 1.0)

    def spend(self, client: str, tokens: int) -> None:
        """Counts tokens of a prompt or a reply, which are known only when the request runs."""
        if self._tokens is not None:
            self._tokens.spend(client, tokens)

    def told(self, client: str) -> dict[str, str]:
        """Headers that say what is left."""
        kinds = [kind for kind in (self._requests, self._tokens) if kind is not None]
        return {name: value for kind in kinds for name, value in kind.told(client).items()}

    @contextmanager
    def running(self, client: str, replies: int = 1) -> Iterator[None]:
        """So many of the client's replies; a call counts as one before it is read. Raises ApiError 429 where too many
        run."""
        if replies > self.left(client):
            raise _too_many(f"{self._at_once} replies of this client at a time", RETRY_SECONDS, {})
        self._running[client] += replies
        try:
            yield
        finally:
            self._running[client] -= replies
            if not self._running[client]:
                del self._running[client]

    def left(self, client: str) -> float:
        """How many more replies of the client may run now."""
        return self.most - self._running[client]

    @property
    def most(self) -> float:
        """Most replies of a client at a time."""
        return math.inf if self._at_once is None else self._at_once


def _allowance(kind: str, rate: int | None) -> Allowance | None:
    return None if rate is None else Allowance(kind, rate)


def _too_many(limit: str, wait: int, headers: dict[str, str]) -> ApiError:
    return ApiError(
        429,
        f"the limit is {limit}; try again in {wait} s",
        "rate_limit_error",
        code="rate_limit_exceeded",
        headers=headers | {"retry-after": str(wait)},
    )
