"""When a reply ends: an end token, a sequence of tokens, or a text. No extra step, no lost token.

Texts are searched in the decoded stream, so a stop that begins inside one token and ends inside another is found, and
text that may still turn into a stop is held back until it can't.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence


class StopTexts:
    """Finds the first of several texts in a stream of pieces; linear in the length of the stream."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = tuple(texts)
        self.held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """(text that may leave, whether a stop text was found). Nothing after a found stop leaves."""
        if not self.texts:
            return piece, False
        self.held += piece
        found = [place for place in (self.held.find(text) for text in self.texts) if place >= 0]
        if found:
            out, self.held = self.held[: min(found)], ""
            return out, True
        keep = max(self._overlap(text) for text in self.texts)
        cut = len(self.held) - keep
        out, self.held = self.held[:cut], self.held[cut:]
        return out, False

    def flush(self) -> str:
        """What was held back, at the end of a reply that ended for another reason."""
        out, self.held = self.held, ""
        return out

    def _overlap(self, text: str) -> int:
        """Length of the longest end of the held text that begins `text`."""
        longest = min(len(text) - 1, len(self.held))
        return next((n for n in range(longest, 0, -1) if text.startswith(self.held[-n:])), 0)


class StopTokens:
    """End tokens, and sequences of tokens that end a reply."""

    def __init__(self, ids: Collection[int], sequences: Sequence[Sequence[int]] = ()) -> None:
        self.ids = frozenset(ids)
        self.sequences = tuple(tuple(sequence) for sequence in sequences if sequence)

    def hit(self, reply: Sequence[int]) -> bool:
        """Whether the reply's last token completes a stop."""
        if reply[-1] in self.ids:
            return True
        return any(tuple(reply[-len(sequence) :]) == sequence for sequence in self.sequences)
