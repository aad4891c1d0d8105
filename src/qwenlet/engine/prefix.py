"""Pages of earlier requests, found again by what they hold.

A page is known by its 64 tokens and by the page before it, the first one by the root: what else its keys and values
depend on (the NTK factor, the adapter; the cache's dtype is the pool's own). Whole tokens are compared, not hashes of
them. The index holds each of its pages once; a page that nobody else holds is given up when pages run out, the least
recently used first, a page always before the one it follows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from qwenlet.cache import PAGE_TOKENS, PagePool

Root = Hashable
_Key = tuple[Hashable, tuple[int, ...]]


@dataclass(frozen=True)
class _Entry:
    number: int  # of this entry, never used again
    page: int


class PrefixCache:
    """Attributes: asked, found: tokens that were looked up, and those of them that need not be computed."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()  # least recently used first
        self._following: dict[Hashable, set[_Key]] = {}  # by root or entry number, the entries that follow it
        self._count = 0
        self.asked = self.found = 0

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, root: Root, tokens: Sequence[int], limit: int) -> list[int]:
        """Pages that hold the first tokens, as many as are known within `limit`, held once more for the caller."""
        chain: list[_Key] = []
        parent: Hashable = root
        for at in range(0, limit - limit % PAGE_TOKENS, PAGE_TOKENS):
            key = (parent, tuple(tokens[at : at + PAGE_TOKENS]))
            entry = self._entries.get(key)
            if entry is None:
                break
            chain.append(key)
            parent = entry.number
        pages = [self._entries[key].page for key in chain]
        self._touch(chain)
        self._pool.share(pages)
        return pages

    def keep(self, root: Root, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Remembers full pages: `pages` hold `tokens` from the beginning."""
        parent: Hashable = root
        chain: list[_Key] = []
        for at, page in enumerate(pages):
            key = (parent, tuple(tokens[at * PAGE_TOKENS : (at + 1) * PAGE_TOKENS]))
            assert len(key[1]) == PAGE_TOKENS, f"page {at} is not full: {len(key[1])} tokens"
            entry = self._entries.get(key)
            if entry is None:  # else another request computed the same at the same time
                self._pool.share([page])
                self._count += 1
                entry = self._entries[key] = _Entry(self._count, page)
                self._following.setdefault(parent, set()).add(key)
            chain.append(key)
            parent = entry.number
        self._touch(chain)

    def _touch(self, chain: Sequence[_Key]) -> None:
        for key in reversed(chain):
            self._entries.move_to_end(key)

    @property
    def idle(self) -> int:
        """Pages that nobody but the index holds."""
        return sum(self._pool.holders(entry.page) == 1 for entry in self._entries.values())

    def give_up(self, count: int) -> int:
        """Frees up to so many idle pages; how many it were."""
        freed = 0
        for key in list(self._entries):
            if freed >= count:
                break
            if key in self._entries and self._pool.holders(self._entries[key].page) == 1:
                freed += self._forget(key)
        return freed

    def _forget(self, key: _Key) -> int:
        """Drops an entry and those that follow it, which nobody could find any more; how many pages became free.

        Pages that follow an idle one may be in use: a request that computed the same beginning has pages of its own.
        """
        self._following[key[0]].discard(key)
        if not self._following[key[0]]:
            del self._following[key[0]]
        before, gone = self._pool.free_pages, [key]
        while gone:
            entry = self._entries.pop(gone.pop())
            gone += self._following.pop(entry.number, ())
            self._pool.give_back([entry.page])
        return self._pool.free_pages - before

    def clear(self) -> None:
        """Forgets everything; pages that requests hold stay theirs."""
        for entry in self._entries.values():
            self._pool.give_back([entry.page])
        self._entries.clear()
        self._following.clear()
