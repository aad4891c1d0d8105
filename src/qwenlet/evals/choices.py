"""Which of four letters a reply means: the published rules, and ours.

The published rules first replace every option's text in the reply by its letter and then look, in this order, for a
phrase that names the answer, for a letter that is called correct, for a letter at the beginning and for any letter that
stands alone. Where all of that finds nothing they take the option whose text is most like the reply: a guess, which we
count as one. They also take the article "A" for the letter.

Ours read what the reply says: its last statement of an answer, a letter it opens with, the only option whose text it
quotes, the only letter it mentions. The article is no letter, what is denied is no answer, and where nothing is said
nothing is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qwenlet.evals.extras import library

LETTERS = ("A", "B", "C", "D")

_LETTER = "(A|B|C|D)"
_OTHER = "[^ABCD]"


@dataclass(frozen=True)
class Read:
    """Attributes: letter: None where nothing was found. guessed: by likeness alone."""

    letter: str | None
    guessed: bool = False


Rule = Callable[[str, str, Mapping[str, str]], Read]
"""(reply, question, options by letter) -> what was read."""


# --------------------------------------------------------------------------------------------------- published


_ENGLISH = tuple(
    map(
        re.compile,
        (
            # choose B, the answer is B, but not "the answer isn't B"
            rf"(?:[Cc]hoose|(?:[Aa]nswer|[Cc]hoice)(?!{_OTHER}{{0,20}}?(?:n't|not)){_OTHER}{{0,10}}?\b(?:|is|:|be)\b)"
            rf"{_OTHER}{{0,20}}?\b{_LETTER}\b",
            # B is correct
            rf"\b{_LETTER}\b(?!{_OTHER}{{0,8}}?(?:n't|not){_OTHER}{{0,5}}?(?:correct|right)){_OTHER}{{0,10}}?"
            r"\b(?:correct|right)\b",
            rf"^{_LETTER}(?:\.|,|:|$)",
            rf"(?<![a-zA-Z]){_LETTER}(?![a-zA-Z=])",
        ),
    )
)
_IS = "(?:是|为|：|:|】)"
_CHINESE = tuple(
    map(
        re.compile,
        (
            rf"(?:(?:选|选择|选定)|(?:答案|选项)(?!{_OTHER}{{0,10}}?(?:不|非){_OTHER}{{0,10}}?{_IS}){_OTHER}{{0,10}}?{_IS}"
            rf"{_OTHER}{{0,10}}?){_LETTER}(?:选项)?(?:[).。，,．、ABCD]|$)",
            rf"{_LETTER}(?:选?项)?(?!{_OTHER}{{0,4}}?(?:不|非){_OTHER}{{0,4}}?(?:正确|对|符合)){_OTHER}{{0,4}}?(?:正确|对|符合)",
            rf"^{_LETTER}(?:[。.，,．]|$)",
            rf"(?<![a-zA-Z]){_LETTER}(?![a-zA-Z=])",
        ),
    )
)


def published_english(reply: str, question: str, options: Mapping[str, str]) -> Read:
    """The rules of evaluate_chat_mmlu."""
    for letter, text in _longest_first(options):
        reply = re.sub(re.escape(text.rstrip(".")), letter, reply, flags=re.IGNORECASE)
    return _by_patterns(_ENGLISH, reply, options)


def published_chinese(reply: str, question: str, options: Mapping[str, str]) -> Read:
    """The rules of evaluate_chat_ceval; the question's own words, repeated in the reply, stand for "the answer is"."""
    pieces = question.rstrip("。").split("。")[-1].split("_")
    if len(pieces[0].strip()) > 4:
        reply = reply.replace(pieces[0], "答案是")
    if len(pieces[-1].strip()) > 4:
        reply = reply.replace(pieces[-1], "")
    for letter, text in _longest_first(options):
        reply = reply.replace(text.rstrip("。"), letter)
    return _by_patterns(_CHINESE, reply, options)


def _longest_first(options: Mapping[str, str]) -> list[tuple[str, str]]:
    return sorted(options.items(), key=lambda option: len(option[1]), reverse=True)


def _by_patterns(patterns: tuple[re.Pattern[str], ...], reply: str, options: Mapping[str, str]) -> Read:
    for pattern in patterns:
        if found := pattern.search(reply):
            return Read(found.group(1))
    return Read(_most_alike(reply, options), guessed=True)


def check_library() -> None:
    """Raises MissingExtraError where the published rules could not guess."""
    library("rapidfuzz", "the published reading of chat replies")


def _most_alike(reply: str, options: Mapping[str, str]) -> str:
    rapidfuzz = library("rapidfuzz", "the published reading of chat replies")
    clean = rapidfuzz.utils.default_process
    texts = [options[letter] for letter in LETTERS]
    scores = [rapidfuzz.fuzz.WRatio(clean(reply), clean(text)) for text in texts]
    return LETTERS[scores.index(max(scores))]


# --------------------------------------------------------------------------------------------------------- ours


_ALONE = r"(?<![A-Za-z])([A-D])(?![A-Za-z'’=])(?! [a-z])"  # "A" before a word in small letters is the article
_WRAPPED = r"[\s*_$(\[{\"'“‘（【「:：]*"

_STATED_ENGLISH = re.compile(
    r"(?i:\b(?:answer|choice|option)\b(?:(?!\bnot\b|n't)[^.\n]){0,40}?(?:\bis\b|\bbe\b|:))"
    rf"{_WRAPPED}(?i:option\s+|choice\s+)?{_WRAPPED}{_ALONE}"
    rf"|(?i:\b(?:choose|select|pick))\b{_WRAPPED}(?i:option\s+)?{_WRAPPED}{_ALONE}"
    rf"|\\boxed\{{(?:\\text\{{)?{_WRAPPED}{_ALONE}"
)
_CALLED_ENGLISH = re.compile(
    r"(?<![A-Za-z])([A-D])\b[)\]*\"'.]*\s+(?:is|would be)\s+(?:the\s+)?(?:most\s+|best\s+)?"
    r"(?:correct|right|suitable|appropriate|accurate|answer)\b"
)
_STATED_CHINESE = re.compile(
    r"(?:正确)?(?:答案|选项)(?:(?!不|非)[^。\n]){0,10}?(?:是|为|选|：|:)"
    rf"{_WRAPPED}(?:选项)?{_WRAPPED}([A-D])(?![A-Za-z])"
    rf"|(?<!不)(?<!不能)选(?:择|定)?(?:选项|项)?{_WRAPPED}([A-D])(?![A-Za-z])"
)
_CALLED_CHINESE = re.compile(r"(?<![A-Za-z])([A-D])[)）】]?(?:选?项)?(?:是|为)?(?:正确|对的|符合题意)")
_OPENS = re.compile(r"^[\s*(\[（【\"'“]*([A-D])(?:[\s*)\]）】\"'”]*(?:[.:：,，。．、)）]|$|\n))")


def improved_english(reply: str, question: str, options: Mapping[str, str]) -> Read:
    """Ours, for replies in English."""
    return _as_said(reply, options, _STATED_ENGLISH, _CALLED_ENGLISH)


def improved_chinese(reply: str, question: str, options: Mapping[str, str]) -> Read:
    """Ours, for replies in Chinese."""
    return _as_said(reply, options, _STATED_CHINESE, _CALLED_CHINESE)


def _as_said(reply: str, options: Mapping[str, str], *statements: re.Pattern[str]) -> Read:
    if opened := _OPENS.match(reply):
        return Read(opened.group(1))
    for pattern in statements:
        if found := list(pattern.finditer(reply)):
            return Read(next(group for group in found[-1].groups() if group))
    if (quoted := _quoted(reply, options)) is not None:
        return Read(quoted)
    mentioned = set(re.findall(_ALONE, reply))
    return Read(mentioned.pop() if len(mentioned) == 1 else None)


def _quoted(reply: str, options: Mapping[str, str]) -> str | None:
    """The one option whose text stands in the reply; one that is part of a longer one found does not count."""
    folded = reply.casefold()
    texts = {letter: text.strip().rstrip(".。").casefold() for letter, text in options.items()}
    found = {letter: text for letter, text in texts.items() if len(text) > 1 and text in folded}
    whole = [
        letter for letter, text in found.items() if not any(text != other and text in other for other in found.values())
    ]
    return whole[0] if len(whole) == 1 else None
