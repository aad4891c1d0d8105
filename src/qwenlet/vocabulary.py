"""Learns extra words for Qwen's vocabulary: `qwenlet vocab extend`. No torch in here.

A word becomes one token by a chain of merges on top of the vocabulary as it is, so text without the new words keeps
its ids. Merges are learnt as the published script does: the most frequent first; of equally frequent ones the shortest
in characters, then in bytes, then the first in order. The result is an extra vocabulary file that
`Tokenizer.from_file(..., extra_vocab_file=...)` reads.

Left out: growing the model's embedding. A model with 151,936 rows has 85 to spare, which are untrained.
"""

from __future__ import annotations

import codecs
import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from qwenlet.errors import TokenizerError
from qwenlet.tokenizer import Tokenizer
from qwenlet.tokenizer_formats import write_ranks

Merge = tuple[bytes, int]


@dataclass(frozen=True)
class SkippedWord:
    """A word that can't or needn't be learnt, and why."""

    word: str
    reason: str


@dataclass(frozen=True)
class LearnedMerges:
    """New tokens with their ids, in the order they were learnt, and the words left out."""

    merges: list[Merge]
    skipped: list[SkippedWord]


def read_word_list(path: str | Path) -> dict[str, int]:
    """Reads lines of `word` or `word<TAB>frequency` in UTF-8; a repeated word adds up, blank lines are passed over.

    Raises:
        TokenizerError: the file can't be read, or a line is not of that form (file:line).
    """
    path = Path(path)
    try:
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise TokenizerError(f"the word list {path} can't be read: {error.strerror}") from error
    words: dict[str, int] = defaultdict(int)
    for number, raw in enumerate(data.split(b"\n"), 1):
        try:
            line = raw.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{path}:{number} is not UTF-8: byte {raw[error.start]:#04x}") from None
        if not line.strip():
            continue
        word, tab, digits = line.partition("\t")
        if not word or (tab and not (digits.isascii() and digits.isdigit() and int(digits) > 0)):
            raise TokenizerError(f"{path}:{number} is {line[:80]!r}, expected 'word' or 'word<TAB>frequency'")
        words[word] += int(digits) if tab else 1
    return dict(words)


def learn_merges(
    tokenizer: Tokenizer, words: Mapping[str, int] | Iterable[str], start_id: int | None = None
) -> LearnedMerges:
    """Learns the merges that make each of `words` one token.

    Args:
        words: word -> frequency, or words of frequency 1 each time they occur.
        start_id: id of the first new token; by default the first free one.

    Raises:
        TokenizerError: another vocabulary than Qwen's, a start_id in use, a frequency that is not a positive number.
    """
    if not tokenizer.is_qwen:
        raise TokenizerError(f"words can be added to Qwen's own vocabulary only, not to that of {tokenizer.source}")
    first_id = tokenizer.vocab_size if start_id is None else start_id
    if first_id < tokenizer.vocab_size:
        raise TokenizerError(f"start_id is {first_id}, but ids below {tokenizer.vocab_size} are in use")

    skipped, sequences, frequencies = [], [], []
    for word, frequency in _frequencies(tokenizer, words).items():
        ids = tokenizer.encode(word, allowed_special=set())
        pieces = tokenizer.pieces(word)
        if len(ids) == 1:
            skipped.append(SkippedWord(word, f"it is the token {ids[0]} already"))
        elif len(pieces) != 1:
            skipped.append(SkippedWord(word, f"text is cut inside it: {' | '.join(pieces)}"))
        else:
            sequences.append([tokenizer.token_bytes(id) for id in ids])
            frequencies.append(frequency)
    tokens = _Learner(sequences, frequencies).run()
    return LearnedMerges([(token, first_id + n) for n, token in enumerate(tokens)], skipped)


def write_extra_vocab(path: str | Path, merges: Iterable[Merge]) -> None:
    """Writes merges as an extra vocabulary file, all of it or nothing."""
    write_ranks(Path(path), merges)


def _frequencies(tokenizer: Tokenizer, words: Mapping[str, int] | Iterable[str]) -> dict[str, int]:
    pairs: Iterable[tuple[Any, Any]] = words.items() if isinstance(words, Mapping) else ((word, 1) for word in words)
    frequencies: dict[str, int] = defaultdict(int)
    for word, frequency in pairs:
        if not isinstance(word, str) or not word:
            raise TokenizerError(f"a word is {word!r}, expected text")
        if type(frequency) is not int or frequency < 1:
            raise TokenizerError(f"the frequency of {word!r} is {frequency!r}, expected a whole number from 1 up")
        frequencies[tokenizer.normalize(word)] += frequency
    return frequencies


class _Learner:
    """Byte-pair learning with counts kept up to date, so that a merge costs only the words it touches.

    A candidate is the bytes of two neighbours: the tokenizer, too, merges by what the result is, not by its halves.
    """

    def __init__(self, sequences: list[list[bytes]], frequencies: list[int]) -> None:
        self.sequences = sequences
        self.frequencies = frequencies
        self.counts: dict[bytes, int] = defaultdict(int)
        self.words_with: dict[bytes, set[int]] = defaultdict(set)
        for word in range(len(sequences)):
            self._count(word, +1)
        self.heap = [self._key(candidate) for candidate in self.counts]
        heapq.heapify(self.heap)

    def run(self) -> list[bytes]:
        tokens = []
        while self.heap:
            negative_count, *_, candidate = heapq.heappop(self.heap)
            if negative_count != -self.counts[candidate] or not negative_count:
                continue  # an outdated entry
            tokens.append(candidate)
            changed: set[bytes] = set()
            for word in list(self.words_with[candidate]):
                changed |= self._count(word, -1)
                self.sequences[word] = _merged(self.sequences[word], candidate)
                changed |= self._count(word, +1)
            for touched in changed:
                heapq.heappush(self.heap, self._key(touched))
        return tokens

    def _count(self, word: int, sign: int) -> set[bytes]:
        candidates = [left + right for left, right in pairwise(self.sequences[word])]
        for candidate in candidates:
            self.counts[candidate] += sign * self.frequencies[word]
            if sign > 0:
                self.words_with[candidate].add(word)
            else:
                self.words_with[candidate].discard(word)
        return set(candidates)

    def _key(self, candidate: bytes) -> tuple[int, int, int, str, bytes]:
        text = candidate.decode("utf-8", "replace")
        return (-self.counts[candidate], len(text), len(candidate), text, candidate)


def _merged(sequence: list[bytes], token: bytes) -> list[bytes]:
    """Joins neighbours that make `token`, from left to right."""
    result = [sequence[0]]
    for part in sequence[1:]:
        if result[-1] + part == token:
            result[-1] = token
        else:
            result.append(part)
    return result
