"""Records -> token ids, and which of them are learned. No torch in here.

    load_samples   files -> Samples, through a cache on disk
    encode         records -> Samples
    Samples        all ids one after another, the way the cache holds them
    Report         what became of the records: nothing is left out in silence

A dialogue is one sample (with tools, one for each place where its replies saw them), or is left out (or cut) where
it is too long; a text is cut into as many as it takes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from qwenlet import chat
from qwenlet.chat import Message
from qwenlet.config import DataConfig
from qwenlet.errors import DataError
from qwenlet.tokenizer import Tokenizer
from qwenlet.train.records import Dialogue, Record, Text, read_records

_FORM = 2  # of the cache's files
_HASHED = 1 << 20  # numbers at a time


@dataclass
class Report:
    """What became of the records.

    Attributes:
        forms: how many had which form.
        bad: (where, why) of those that could not be used and were left out.
        long: those left out for their length; cut: those that lost their end; nothing: those left out because nothing
            of them is learned; openings: messages before a first question that were left out.
        samples, tokens, learned: what is there to train on.
        cached: it came out of the cache.
    """

    forms: dict[str, int] = field(default_factory=dict)
    bad: list[tuple[str, str]] = field(default_factory=list)
    long: int = 0
    cut: int = 0
    nothing: int = 0
    openings: int = 0
    samples: int = 0
    tokens: int = 0
    learned: int = 0
    cached: bool = False

    def lines(self, max_length: int) -> list[str]:
        """For people."""
        forms = ", ".join(f"{count:,} {form}" for form, count in self.forms.items())
        share = self.learned / max(self.tokens, 1)
        mean = self.tokens / max(self.samples, 1)
        lines = [
            f"{forms}: {self.samples:,} samples of {mean:.0f} tokens on average, {self.tokens:,} in all, "
            f"{self.learned:,} of them learned ({share:.0%})"
        ]
        for count, what in (
            (
                len(self.bad),
                f"that can't be used left out, the first: {self.bad[0][0]}: {self.bad[0][1]}" if self.bad else "",
            ),
            (self.long, f"longer than {max_length} tokens left out (--long cut keeps their beginning)"),
            (self.cut, f"cut to {max_length} tokens"),
            (self.nothing, "of which nothing would be learned left out"),
        ):
            if count:
                lines.append(f"{count:,} record{'s' if count > 1 else ''} {what}")
        if self.openings:
            lines.append(f"{self.openings:,} messages before a first question left out")
        return lines


@dataclass(frozen=True)
class Samples:
    """Samples one after another.

    Attributes:
        ids: [N] int32; learned: [N] bool; starts: [S + 1] int64, where each sample begins.
        where: of each sample the file and line it came from.
    """

    ids: npt.NDArray[np.int32]
    learned: npt.NDArray[np.bool_]
    starts: npt.NDArray[np.int64]
    where: Sequence[str]
    report: Report

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        piece = slice(self.starts[index], self.starts[index + 1])
        return self.ids[piece], self.learned[piece]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.diff(self.starts)

    @property
    def fingerprint(self) -> str:
        """The same for the same samples."""
        digest = hashlib.sha256()
        for part in (self.ids, self.learned, self.starts):
            for at in range(0, len(part), _HASHED):  # a corpus is a mapped file, larger than memory maybe
                digest.update(np.ascontiguousarray(part[at : at + _HASHED]).tobytes())
        return digest.hexdigest()[:16]

    def targets(self, index: int) -> int:
        """How many tokens of a sample the loss counts: the first has nothing before it to be foretold from."""
        return int(self[index][1][1:].sum())

    def select(self, indices: Sequence[int]) -> Samples:
        """Some of them, in this order."""
        parts = [self[index] for index in indices]
        starts = np.cumsum([0, *(len(ids) for ids, _ in parts)])
        ids = np.concatenate([part for part, _ in parts]) if parts else self.ids[:0]
        learned = np.concatenate([part for _, part in parts]) if parts else self.learned[:0]
        report = replace(self.report, samples=len(parts), tokens=len(ids), learned=int(learned.sum()))
        return Samples(ids, learned, starts, tuple(self.where[index] for index in indices), report)

    def split(self, held_out: float, seed: int) -> tuple[Samples, Samples]:
        """(to train on, held out): a share below 1, or a number of samples.

        Raises:
            DataError: nothing would be left to train on.
        """
        count = round(held_out * len(self)) if held_out < 1 else int(held_out)
        count = max(count, 1)
        if count >= len(self):
            raise DataError(f"{count} of {len(self)} samples would be held out, so that none is left to train on")
        order = np.random.Generator(np.random.Philox(seed)).permutation(len(self))
        return self.select(sorted(order[count:])), self.select(sorted(order[:count]))


def load_samples(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    system: str | None,
    cache: Path | None = None,
) -> Samples:
    """The samples of some files.

    Args:
        system: the system message of dialogues without one; None: they get none.
        cache: a folder where the ids are kept for the next time; None keeps none.
    Raises:
        DataError: as `read_records`; or nothing is left.
        TokenizerError: dialogues for a vocabulary without ChatML's control tokens.
    """
    kept = None if cache is None else cache / f"{_key(paths, tokenizer, config, system)}.npz"
    if kept is not None and (found := _load(kept)) is not None:
        return found
    records, bad = read_records(paths, skip_bad=config.bad == "skip")
    samples = encode(records, tokenizer, config, system=system)
    samples.report.bad = bad.found
    if kept is not None:
        _save(kept, samples)
    return samples


def encode(records: Sequence[Record], tokenizer: Tokenizer, config: DataConfig, *, system: str | None) -> Samples:
    """Raises DataError if nothing is left, or something is too long and may not be."""
    report = Report(forms=dict(Counter(record.form for record in records)))
    parts: list[tuple[list[int], list[bool]]] = []
    where: list[str] = []
    for record in records:
        if isinstance(record, Dialogue):
            report.openings += record.dropped
            made = [_dialogue(part, tokenizer, config, system) for part in _parts(record, config.labels)]
        else:
            made = _text(record, tokenizer, config.max_length)
        for ids, learned in made:
            if len(ids) > config.max_length:
                if config.long == "error":
                    raise DataError(
                        f"{record.where} has {len(ids)} tokens, more than the {config.max_length} allowed",
                        hint="raise --max-length, or choose --long drop or cut",
                    )
                if config.long == "drop":
                    report.long += 1
                    continue
                report.cut += 1
                ids, learned = ids[: config.max_length], learned[: config.max_length]
            if not any(learned[1:]):
                report.nothing += 1
                continue
            parts.append((ids, learned))
            where.append(record.where)
    if not parts:
        reasons = "; ".join(report.lines(config.max_length)[1:]) or "no record had a token to learn"
        raise DataError(f"no sample is left to train on: {reasons}")
    whole = np.concatenate([np.array(part, np.int32) for part, _ in parts])
    marks = np.concatenate([np.array(part, np.bool_) for _, part in parts])
    report.samples, report.tokens, report.learned = len(parts), len(whole), int(marks.sum())
    return Samples(whole, marks, np.cumsum([0, *(len(part) for part, _ in parts)]), tuple(where), report)


def _parts(record: Dialogue, labels: str) -> Sequence[Dialogue]:
    """The texts in which a dialogue's replies are learned; where everything is learned, it is once."""
    if not record.parts or labels == "all":
        return (record,)
    if labels == "last":
        return [part for part in record.parts if _asked(part.messages) == _asked(record.messages)]
    return [part for part in record.parts if any(part.learned)] or (record,)


def _asked(messages: Sequence[Message]) -> int:
    """Index of the last question, -1 without any."""
    return max((index for index, message in enumerate(messages) if message.role == "user"), default=-1)


def _dialogue(
    record: Dialogue, tokenizer: Tokenizer, config: DataConfig, system: str | None
) -> tuple[list[int], list[bool]]:
    messages, learned = list(record.messages), list(record.learned)
    if system is not None and messages[0].role != "system":
        messages, learned = [Message("system", system), *messages], [False, *learned]
    if config.labels == "last":
        # a reply that called tools is one: from the last question on
        asked = _asked(messages)
        learned = [want and index > asked for index, want in enumerate(learned)]
    ids, marks = chat.label(tokenizer, messages, learned, published=config.labels == "published")
    return ids, [True] * len(ids) if config.labels == "all" else marks


def _text(record: Text, tokenizer: Tokenizer, max_length: int) -> list[tuple[list[int], list[bool]]]:
    """A text in pieces, ended by the token that ends one; with a prompt it is one piece, as long as it is."""
    end = tokenizer.eod_id if tokenizer.eod_id is not None else tokenizer.eos_id
    prompt = tokenizer.encode(record.prompt, allowed_special=set())
    ids = tokenizer.encode(record.text, allowed_special=set()) + ([] if end is None else [end])
    if record.prompt:
        return [(prompt + ids, [False] * len(prompt) + [True] * len(ids))]
    pieces = [ids[at : at + max_length] for at in range(0, len(ids), max_length)]
    return [(piece, [True] * len(piece)) for piece in pieces if len(piece) > 1]


# ----------------------------------------------------------------------------------------------------------- the cache


def _key(paths: Sequence[str | Path], tokenizer: Tokenizer, config: DataConfig, system: str | None) -> str:
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    settings = {name: getattr(config, name) for name in ("max_length", "long", "labels", "bad")}
    digest.update(json.dumps([_FORM, settings, system, [str(path) for path in paths]], sort_keys=True).encode())
    for path in paths:
        try:
            digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
        except OSError as error:
            raise DataError(f"can't read {path}: {error.strerror}") from None
    return digest.hexdigest()[:32]


def _save(path: Path, samples: Samples) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".partial-{os.getpid()}.npz")
    about = json.dumps({"where": samples.where, "report": asdict(samples.report)})
    np.savez(
        partial, ids=samples.ids, learned=samples.learned, starts=samples.starts,
        about=np.frombuffer(about.encode(), np.uint8),
    )  # fmt: skip
    os.replace(partial, path)


def _load(path: Path) -> Samples | None:
    """None where there is no such file, or a damaged one: it is made again."""
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            about = json.loads(file["about"].tobytes())
            report = Report(
                **about["report"] | {"bad": [tuple(pair) for pair in about["report"]["bad"]], "cached": True}
            )
            return Samples(file["ids"], file["learned"], file["starts"], tuple(about["where"]), report)
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile):
        return None
