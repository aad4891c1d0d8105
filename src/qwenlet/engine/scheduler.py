"""Who runs next, with how many tokens and which pages.

Replies that are being written get one token each (a single one guesses beside it), then prompts a limited number.
Pages are taken as they are needed. Where they run out, the least recently used pages of the prefix cache go first, then
the pages of the request that comes last: it waits, keeps its reply, and stores its tokens again when there is room.
Order is priority, then arrival; nobody overtakes, so nobody starves among equals.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qwenlet.cache import PAGE_TOKENS, PagePool, pages_for
from qwenlet.engine.prefix import PrefixCache
from qwenlet.engine.request import Request


@dataclass(frozen=True)
class Work:
    """What a request does in one step.

    Attributes:
        tokens: to be stored, from position request.stored on.
        guesses: so many of them, the last ones, are guesses.
        wanted: logits of so many of the last tokens are needed.
    """

    request: Request
    tokens: Sequence[int]
    guesses: int
    wanted: int


@dataclass(frozen=True)
class Limits:
    """Attributes:
    requests: that run at once.
    prompt, mixed: tokens of prompts in a step, alone and beside replies.
    ahead: tokens of each reply that the step after may store before this one is taken in, where pages are free.
    """

    requests: int
    prompt: int
    mixed: int
    ahead: int = 0


class Scheduler:
    """Attributes: waiting, running: both in order. preemptions: how often a request had to give its pages back."""

    def __init__(self, pool: PagePool, prefix: PrefixCache | None, limits: Limits, soft_pages: int) -> None:
        self.pool, self.prefix, self.limits = pool, prefix, limits
        self.soft_pages = soft_pages  # from here on old prefixes go before untouched pages come into memory
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.preemptions = 0

    def add(self, request: Request) -> None:
        bisect.insort(self.waiting, request, key=_order)

    def remove(self, request: Request) -> None:
        """Forgets a request and takes its pages back. Its followers find a new leader among themselves."""
        for queue in (self.waiting, self.running):
            if request in queue:
                queue.remove(request)
            for leader in queue:
                if request in leader.followers:
                    leader.followers.remove(request)
        self.pool.give_back(request.pages)
        request.pages = []
        if request.followers:
            leader, *others = request.followers
            request.followers, leader.followers = [], others
            self.add(leader)

    def start_followers(self, leader: Request) -> list[Request]:
        """Lets the other choices of a stored prompt run from its pages; each copies a page when it writes into it."""
        followers, leader.followers = leader.followers, []
        for request in followers:
            self.pool.share(leader.pages)
            request.pages, request.stored = list(leader.pages), leader.stored
            request.indexed, request.cached = leader.indexed, leader.stored
            request.started_at, request.admitted = leader.started_at, True
            bisect.insort(self.running, request, key=_order)
        return followers

    # ------------------------------------------------------------------------------------------- one step

    def schedule(self, guess: Callable[[Request], Sequence[int]] | None = None) -> list[Work]:
        """The next step's work, with pages for all of it; empty if there is nothing to do."""
        chosen: dict[Request, Work] = {}
        writers = [request for request in self.running if request.writes]
        for request in writers:
            if request in self.running:  # else it gave its pages to an earlier one
                work = self._reply_work(request, guess if len(self.running) == 1 else None)
                if work is not None:
                    chosen[request] = work
        budget = self.limits.mixed if chosen else self.limits.prompt
        for request in [request for request in self.running if not request.writes]:
            if budget and request in self.running:
                budget -= self._prompt_work(request, budget, chosen)
        while budget and self.waiting and self._admit(self.waiting[0]):
            request = self.waiting.pop(0)
            bisect.insort(self.running, request, key=_order)
            taken = self._prompt_work(request, budget, chosen)
            if not taken or request not in self.running:
                break  # there was no room after all: trying again in this step would change nothing
            budget -= taken
        return [work for request, work in chosen.items() if request in self.running]

    def _reply_work(self, request: Request, guess: Callable[[Request], Sequence[int]] | None) -> Work | None:
        tokens = request.known[request.stored :]
        guesses = [] if guess is None else list(guess(request))
        if len(guesses) and len(tokens) + len(guesses) > self._spare(request):
            guesses = []  # nobody gives way for a guess
        if guesses and self._make_room(request, len(tokens) + len(guesses)):
            return Work(request, [*tokens, *guesses], len(guesses), len(guesses) + 1)
        if not self._make_room(request, len(tokens)):
            return None
        self._reserve(request, min(request.stored + len(tokens) + self.limits.ahead, request.total_tokens))
        return Work(request, tokens, 0, 1)

    def _reserve(self, request: Request, tokens: int) -> None:
        """Pages for so many tokens in all, if they are free: nobody gives way for them."""
        missing = pages_for(tokens) - len(request.pages)
        if 0 < missing <= self.pool.free_pages:
            request.pages += self.pool.take(missing)

    def _prompt_work(self, request: Request, budget: int, chosen: dict[Request, Work]) -> int:
        """How much of the budget a piece of what the request has to store takes."""
        tokens = request.known[request.stored : request.stored + budget]
        if not self._make_room(request, len(tokens)):
            return 0
        end = request.stored + len(tokens)
        if request.reads_hidden:
            wanted = 0
        elif request.reader is not None:
            wanted = max(end - max(request.read_from, request.stored), 0)
        else:
            wanted = int(end == len(request.known))
        chosen[request] = Work(request, tokens, 0, wanted)
        return len(tokens)

    # ------------------------------------------------------------------------------------------- pages

    def _admit(self, request: Request) -> bool:
        """Takes the pages that hold the beginning already, if there is room for the rest."""
        if sum(_choices(one) for one in [*self.running, request]) > self.limits.requests:
            return False
        found: list[int] = []
        if self.prefix is not None:
            # the last token has to run: its logits are wanted
            limit = min(len(request.known) - 1, request.read_from if request.reader is not None else len(request.known))
            found = self.prefix.find(request.root, request.known, limit)
        needed = pages_for(min(len(request.known) + 1, request.total_tokens)) - len(found)
        while needed > self._available() and self.running and self.running[-1].priority > request.priority:
            self._preempt(self.running[-1])
        if self.running and needed > self._available():
            self.pool.give_back(found)
            return False
        request.pages, request.stored, request.indexed = found, len(found) * PAGE_TOKENS, len(found)
        if self.prefix is not None and not request.admitted:
            request.cached = request.stored
            self.prefix.asked += len(request.known)
            self.prefix.found += request.stored
        request.admitted = True
        return True

    def _available(self) -> int:
        return self.pool.free_pages + (0 if self.prefix is None else self.prefix.idle)

    def _spare(self, request: Request) -> int:
        """Tokens the request could store without anybody giving up anything."""
        own = len(request.pages) * PAGE_TOKENS - request.stored
        return own + max(self.pool.free_pages - 1, 0) * PAGE_TOKENS  # one may be needed for a copy

    def _make_room(self, request: Request, count: int) -> bool:
        """Pages of its own for the next `count` tokens; False if the request had to give way itself."""
        first = request.stored // PAGE_TOKENS
        while True:
            shared = [at for at in range(first, len(request.pages)) if self.pool.holders(request.pages[at]) > 1]
            missing = pages_for(request.stored + count) - len(request.pages)
            needed = len(shared) + max(missing, 0)
            if self._free(needed):
                break
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        for at in shared:
            (own,) = self.pool.take(1)
            self.pool.copy(request.pages[at], own)
            self.pool.give_back([request.pages[at]])
            request.pages[at] = own
        request.pages += self.pool.take(max(missing, 0))
        return True

    def _free(self, count: int) -> bool:
        """Whether so many pages are free now."""
        if not count:
            return True
        short = count - self.pool.free_pages
        if short <= 0 and self.pool.touched >= self.soft_pages:
            short = count - self.pool.free_touched
        if short > 0 and self.prefix is not None:
            self.prefix.give_up(short)
        return self.pool.free_pages >= count

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.preemptions += 1
        self.preemptions += 1
        self.add(request)

    def _release(self, request: Request) -> None:
        self.pool.give_back(request.pages)
        request.pages, request.stored, request.indexed = [], 0, 0


def _choices(request: Request) -> int:
    return 1 + len(request.followers)


def _order(request: Request) -> tuple[int, int]:
    return request.order
