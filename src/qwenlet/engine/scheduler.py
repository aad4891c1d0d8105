"""Who runs next. One row a step for now: admitted requests take turns, the others wait until pages are free."""

from __future__ import annotations

from collections import deque

from qwenlet.cache import PagePool, pages_for
from qwenlet.engine.request import Request


class Scheduler:
    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.waiting: deque[Request] = deque()
        self.running: deque[Request] = deque()

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def schedule(self) -> Request | None:
        """The request whose turn it is, with pages for all it may ever store; None if there is nothing to do."""
        while self.waiting and pages_for(self.waiting[0].total_tokens) <= self.pool.free_pages:
            request = self.waiting.popleft()
            request.pages = self.pool.take(pages_for(request.total_tokens))
            self.running.append(request)
        if not self.running:
            return None
        self.running.rotate(-1)
        return self.running[-1]

    def remove(self, request: Request) -> None:
        """Forgets a request and takes its pages back."""
        for queue in (self.waiting, self.running):
            if request in queue:
                queue.remove(request)
        self.pool.give_back(request.pages)
        request.pages = []
