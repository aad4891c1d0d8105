"""When a reply ends: an end token, a sequence of tokens, or a text. No extra step, no lost token.

Texts are searched in the decoded stream, so a stop that begins inside one token and ends inside another is found, and
text that may still turn into a stop is held back until it can't.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence


class StopTexts:
    """Finds the first of several texts in a stream of pieces; linear in the length of the stream, whatever is held."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = tuple(sorted(set(texts)))
        self.held = ""
        self._longest = max(map(len, self.texts), default=0)

    def push(self, piece: str) -> tuple[str, bool]:
        """(text that may leave, whether a stop text was found). Nothing after a found stop leaves."""
        if not self.texts:
            return piece, False
        seen, self.held = len(self.held), self.held + piece
        # one that ends in the piece begins at most its own length before it
        places = (self.held.find(text, max(seen - len(text) + 1, 0)) for text in self.texts)
        found = [place for place in places if place >= 0]
        if found:
            out, self.held = self.held[: min(found)], ""
            return out, True
        cut = self._beginning()
        out, self.held = self.held[:cut], self.held[cut:]
        return out, False

    def flush(self) -> str:
        """What was held back, at the end of a reply that ended for another reason."""
        out, self.held = self.held, ""
        return out

    def _beginning(self) -> int:
        """The first place of the held text from which a stop text may go on."""
        for place in range(max(len(self.held) - self._longest + 1, 0), len(self.held)):
            rest = self.held[place:]
            after = bisect_left(self.texts, rest)  # in their order, texts that begin with it come next
            if after < len(self.texts) and self.texts[after].startswith(rest):
                return place
        return len(self.held)


class StopTokens:
    """End tokens, and sequences of tokens that end a reply.

    Attributes: longest: tokens of the longest of them.
    """

    def __init__(self, ids: Collection[int], sequences: Sequence[Sequence[int]] = ()) -> None:
        self.ids = frozenset(ids)
        self.sequences = tuple(tuple(sequence) for sequence in sequences if sequence)
        self.longest = max(map(len, self.sequences), default=1)

    def hit(self, reply: Sequence[int]) -> bool:
        """Whether the reply's last token completes a stop. Of a longer reply its last `longest` tokens will do."""
        if reply[-1] in self.ids:
            return True
        return any(tuple(reply[-len(sequence) :]) == sequence for sequence in self.sequences)
