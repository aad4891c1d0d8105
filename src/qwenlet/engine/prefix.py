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
        self._keys: dict[int, _Key] = {}  # of each page in the index
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
                entry = self._enter(key, page)
            chain.append(key)
            parent = entry.number
        self._touch(chain)

    def _enter(self, key: _Key, page: int) -> _Entry:
        """A new entry; a page that is known behind a page that was given up moves, and is still held once."""
        if (old := self._keys.get(page)) is None:
            self._pool.share([page])
        else:
            del self._entries[old]
        self._count += 1
        self._keys[page] = key
        entry = self._entries[key] = _Entry(self._count, page)
        return entry

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
            if freed == count:
                break
            entry = self._entries[key]
            if self._pool.holders(entry.page) == 1:
                del self._entries[key], self._keys[entry.page]
                self._pool.give_back([entry.page])
                freed += 1
        return freed

    def clear(self) -> None:
        """Forgets everything; pages that requests hold stay theirs."""
        for entry in self._entries.values():
            self._pool.give_back([entry.page])
        self._entries.clear()
        self._keys.clear()
