"""How text is cut into pieces before byte-pair merging, for each vocabulary we read. No torch in here.

    QWEN     Qwen-1 and Qwen2: text is NFC-normalised, digits stand alone
    SMOLLM   SmolLM: digits are cut out first, then GPT-2's rule holds between them
    GPT2     GPT-2 and byte-level vocabularies that don't name a rule

A pattern is data: tiktoken runs it. What this module adds is safety on hostile text, with unchanged results:
tiktoken's regex engine gives up on about a million blanks in a row, and Unicode normalisation is quadratic in a run of
unordered combining marks.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
# Unicode's White_Space, which is what \s means to tiktoken; Python's own \s has four more
_NEWLINES = "\r\n"
_BLANKS = "\t\x0b\x0c \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"

# tiktoken's engine keeps a state per blank and stops at 1,000,000; shorter runs need no care
_LONG_RUN = 100_000
_LONG_MARKS = 1_000


@dataclass(frozen=True)
class PreTokenizer:
    """One rule for cutting text.

    Attributes:
        name: what GGUF's `tokenizer.ggml.pre` calls it.
        pattern: the pieces, as alternatives of a regular expression.
        nfc: text is brought to Unicode's NFC first.
        newlines_split_blanks: a run of white space is cut after its last line break.
        blanks_stay_before_digits: the last blank before a digit is not cut off its run.
    """

    name: str
    pattern: str
    nfc: bool = False
    newlines_split_blanks: bool = False
    blanks_stay_before_digits: bool = False

    @property
    def engine_pattern(self) -> str:
        r"""`pattern` with the same meaning, run in constant stack where blanks end the text (possessive `\s++$`)."""
        return self.pattern.replace(r"|\s+(?!\S)", r"|\s++$|\s+(?!\S)")

    def normalize(self, text: str) -> str:
        return unicodedata.normalize("NFC", _order_long_mark_runs(text)) if self.nfc and not text.isascii() else text

    def pieces(self, text: str) -> list[str]:
        """The pieces of `text`; byte-pair merging never crosses from one to the next."""
        import regex  # 20 ms that only those who ask for pieces pay

        return [match.group() for match in regex.finditer(self.pattern, self.normalize(text))]

    def chunks(self, text: str) -> Iterator[str]:
        """`text` in chunks that end where pieces end, so that no chunk holds a long run of blanks before other text."""
        if len(text) < _LONG_RUN:
            yield text
            return
        start = 0
        for run in self._long_blanks.finditer(text):
            end = run.end()
            follower = text[end : end + 1]
            stays = not follower or (self.blanks_stay_before_digits and unicodedata.category(follower)[0] == "N")
            cut = end if stays else end - 1  # the last blank may belong to the word that follows
            yield text[start : run.start()]
            yield text[run.start() : cut]
            start = cut
        yield text[start:]

    @property
    def _long_blanks(self) -> re.Pattern[str]:
        if self.newlines_split_blanks:  # blanks before a line break are no trouble, and belong to it
            return re.compile(f"[{_BLANKS}]{{{_LONG_RUN},}}+(?![{_NEWLINES}])")
        return re.compile(f"[{_BLANKS}{_NEWLINES}]{{{_LONG_RUN},}}+")


def _order_long_mark_runs(text: str) -> str:
    """Puts long runs of combining marks into canonical order by a real sort; NFC of the result is NFC of `text`."""
    if len(text) < _LONG_MARKS:
        return text
    import regex

    return str(regex.sub(rf"\p{{M}}{{{_LONG_MARKS},}}+", lambda run: _canonical_order(run.group()), text))


def _canonical_order(marks: str) -> str:
    """Stable sort by combining class between marks of class 0, which nothing may cross."""
    runs = [list(run) for _, run in groupby(marks, key=lambda mark: unicodedata.combining(mark) == 0)]
    return "".join(mark for run in runs for mark in sorted(run, key=unicodedata.combining))


QWEN = PreTokenizer(
    name="qwen2",
    pattern=rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    nfc=True,
    newlines_split_blanks=True,
)
GPT2 = PreTokenizer(
    name="gpt-2",
    pattern=rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+",
)
# One expression for two steps: every digit alone, then GPT-2's rule between digits, where blanks before a digit end
# their stretch of text and so stay together.
SMOLLM = PreTokenizer(
    name="smollm",
    pattern=rf"\p{{N}}|{_CONTRACTIONS}| ?\p{{L}}+| ?[^\s\p{{L}}\p{{N}}]+|\s++(?=\p{{N}})|\s+(?!\S)|\s+",
    blanks_stay_before_digits=True,
)
