"""How much one client may ask for: requests at a time, and requests a minute."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from qwenlet.config import ServerConfig
from qwenlet.server.errors import RETRY_SECONDS, ApiError

_MOST_BUCKETS = 10_000  # of clients that are remembered; more are forgotten once they have all their requests again


@dataclass
class Bucket:
    """Requests that are left, at a moment; they come back evenly."""

    left: float
    at: float


class Limits:
    """Counts by client: a key, or an address where there are no keys."""

    def __init__(self, config: ServerConfig) -> None:
        self._at_once, self._rate = config.max_concurrent, config.max_per_minute
        self._running: Counter[str] = Counter()
        self._buckets: dict[str, Bucket] = {}

    def take(self, client: str) -> dict[str, str]:
        """Counts one request, and gives the headers that say what is left. Raises ApiError 429 where nothing is."""
        if self._rate is None:
            return {}
        now, per_second = time.monotonic(), self._rate / 60
        bucket = self._buckets.setdefault(client, Bucket(self._rate, now))
        bucket.left = min(bucket.left + (now - bucket.at) * per_second, float(self._rate))
        bucket.at = now
        allowed = bucket.left >= 1.0
        if allowed:
            bucket.left -= 1.0
        if len(self._buckets) > _MOST_BUCKETS:
            self._forget(now)
        headers = {
            "x-ratelimit-limit-requests": str(self._rate),
            "x-ratelimit-remaining-requests": str(int(bucket.left)),
            "x-ratelimit-reset-requests": f"{(self._rate - bucket.left) / per_second:.3f}s",
        }
        if not allowed:
            wait = math.ceil((1.0 - bucket.left) / per_second)
            raise _too_many(f"{self._rate} requests a minute of this client", wait, headers)
        return headers

    def _forget(self, now: float) -> None:
        assert self._rate is not None, "there are buckets only where there is a rate"
        full = 60.0
        self._buckets = {client: one for client, one in self._buckets.items() if now - one.at < full}

    @contextmanager
    def running(self, client: str) -> Iterator[None]:
        """One of the client's requests. Raises ApiError 429 where too many run."""
        if self._at_once is not None and self._running[client] >= self._at_once:
            raise _too_many(f"{self._at_once} requests of this client at a time", RETRY_SECONDS, {})
        self._running[client] += 1
        try:
            yield
        finally:
            self._running[client] -= 1
            if not self._running[client]:
                del self._running[client]


def _too_many(limit: str, wait: int, headers: dict[str, str]) -> ApiError:
    return ApiError(
        429,
        f"the limit is {limit}; try again in {wait} s",
        "rate_limit_error",
        code="rate_limit_exceeded",
        headers=headers | {"retry-after": str(wait)},
    )
