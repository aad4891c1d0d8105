"""Documents -> one file of token ids, which a run maps instead of holding it.

    build    files -> OUT/train.tokens, OUT/held-out.tokens and their starts; done once for the same files and settings
    encode   files -> OUT/whole.tokens, all of them
    Corpus   a file of tokens, mapped

No more of it stands in memory than some documents at a time.

Documents are records of .jsonl and .json ({"text": ...}), and in plain text what stands between lines `<|endoftext|>`,
else the whole file. Each ends with the token that ends a text. A document is one sample, or as many pieces of
`max_length` as it takes: no token sees another document. No torch in here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from qwenlet.errors import DataError, RequestError
from qwenlet.tokenizer import Tokenizer
from qwenlet.train.records import Text, read_record, read_values
from qwenlet.train.samples import Report, Samples

_SEPARATOR = "<|endoftext|>"
_FORM = 2
_GROUP = 256  # documents encoded at a time


@dataclass(frozen=True)
class Corpus:
    """Ids of documents one after another.

    Attributes:
        ids: [N] uint16 or uint32, mapped; starts: [D + 1] int64, where each document begins.
        source: the file, for messages.
    """

    ids: np.ndarray
    starts: np.ndarray
    source: str

    @classmethod
    def open(cls, path: Path) -> Corpus:
        """Raises DataError if the files are missing or don't belong together."""
        try:
            about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            ids = np.memmap(path, dtype=np.dtype(about["dtype"]), mode="r")
            starts = np.load(path.with_suffix(".starts.npy"), allow_pickle=False)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path} can't be read: {error}", hint="remove its folder, and it is made again") from None
        if starts[-1] != len(ids) or len(ids) != about["tokens"]:
            raise DataError(
                f"{path} holds {len(ids)} tokens, expected {about['tokens']}", hint="remove its folder to make it again"
            )
        return cls(ids, starts, str(path))

    def samples(self, max_length: int) -> Samples:
        """Every document in pieces of at most `max_length`; a piece of one token foretells nothing and is in no batch.

        Raises DataError if there are no others.
        """
        cuts = [np.arange(first, last, max_length) for first, last in zip(self.starts, self.starts[1:], strict=False)]
        starts = np.concatenate([*cuts, self.starts[-1:]])
        if not (np.diff(starts) > 1).any():
            raise DataError(f"{self.source} has no document of two tokens or more, so that nothing can be foretold")
        learned = np.broadcast_to(np.True_, self.ids.shape)
        report = Report({"text": len(self.starts) - 1}, samples=len(starts) - 1, tokens=len(self.ids))
        report.learned = report.tokens
        return Samples(self.ids, learned, starts, _Places(self.source, starts), report)


class _Places(Sequence[str]):
    """Where each sample stands in its file, made when it is asked for."""

    def __init__(self, source: str, starts: np.ndarray) -> None:
        self.source, self.starts = source, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: Any) -> Any:
        assert isinstance(index, int), "one sample at a time"
        return f"{self.source}, token {self.starts[index]}"


def build(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    held_out: float,
    seed: int = 0,
    threads: int | None = None,
) -> tuple[Corpus, Corpus]:
    """(to learn, held out) of some files, whole documents each; taken from `folder` where it was made before.

    Args:
        held_out: share of the documents that is not learned, at least one; of a single document, its end.
        threads: that encode; all processors unless given.
    Raises:
        DataError: a file that can't be read, no document, a folder that can't be written.
    """
    work = folder / _key(paths, tokenizer, held_out, seed)
    names = (work / "train.tokens", work / "held-out.tokens")
    if not all(name.with_suffix(".json").exists() for name in names):
        with _own_folder(work) as made:  # how many documents there are is known once all are encoded
            whole = _encode(paths, tokenizer, made / "whole.tokens", threads)
            for name, parts in zip(names, _split(whole, held_out, seed), strict=True):
                _write(name, parts, whole.ids.dtype)
            del whole
    return Corpus.open(names[0]), Corpus.open(names[1])


def encode(paths: Sequence[str | Path], tokenizer: Tokenizer, folder: Path, *, threads: int | None = None) -> Corpus:
    """All documents of some files, as `build` does it and with its errors."""
    path = folder / _key(paths, tokenizer, "whole") / "whole.tokens"
    if not path.with_suffix(".json").exists():
        return _encode(paths, tokenizer, path, threads)
    return Corpus.open(path)


def _encode(paths: Sequence[str | Path], tokenizer: Tokenizer, path: Path, threads: int | None) -> Corpus:
    encoded = _encoded(paths, tokenizer, threads or os.cpu_count() or 1)
    first = next(encoded, None)
    if first is None:
        raise DataError(f"there is no text in {', '.join(map(str, paths))}")
    _write(path, itertools.chain([first], encoded), _dtype(tokenizer))
    return Corpus.open(path)


def documents(paths: Sequence[str | Path]) -> Iterator[str]:
    """Texts of some files. Raises DataError with file and line for what is no text."""
    for path in map(Path, paths):
        kind = _kind(path)
        try:
            if kind == "list":
                yield from (_text(value, f"{path}:{line}") for line, value in read_values(path))
                continue
            with open(path, encoding="utf-8-sig") as file:
                if kind == "lines":
                    for number, line in enumerate(file, 1):
                        if line.strip():
                            yield _text(_parsed(line, f"{path}:{number}"), f"{path}:{number}")
                else:
                    yield from (part.strip("\n") for part in _between_separators(file) if part.strip())
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"can't read {path} as UTF-8 text: {error}") from None


def _kind(path: Path) -> str:
    """How a file is read, which its name says."""
    return {".json": "list", ".jsonl": "lines", ".ndjson": "lines"}.get(path.suffix, "plain")


def _between_separators(lines: Iterable[str]) -> Iterator[str]:
    """Texts between lines that begin with the separator; what follows it on its line belongs to the next one."""
    part: list[str] = []
    for number, line in enumerate(lines):
        if number and line.startswith(_SEPARATOR):
            yield "".join(part)
            part, line = [], line.removeprefix(_SEPARATOR)
        part.append(line)
    yield "".join(part)


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {error}") from None


def _text(value: Any, where: str) -> str:
    try:
        record = read_record(value, where)
    except RequestError as error:
        raise DataError(f"{where}: {error.message}") from None
    if not isinstance(record, Text):
        raise DataError(f"{where} is a dialogue", hint="dialogues are for qwenlet finetune; here a record has a text")
    return record.prompt + record.text


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2") if tokenizer.vocab_size <= 1 << 16 else np.dtype("<u4")


def _encoded(paths: Sequence[str | Path], tokenizer: Tokenizer, threads: int) -> Iterator[np.ndarray]:
    """Ids of each document, its end included; merging runs beside itself, as it lets go of the interpreter."""
    end = tokenizer.eod_id if tokenizer.eod_id is not None else tokenizer.eos_id
    tail = [] if end is None else [end]

    def encode(text: str) -> np.ndarray:
        return np.array(tokenizer.encode(text, allowed_special=set()) + tail, np.uint32)

    with ThreadPoolExecutor(threads) as pool:
        group: list[str] = []
        for text in documents(paths):
            group.append(text)
            if len(group) == _GROUP:
                yield from pool.map(encode, group)
                group = []
        yield from pool.map(encode, group)


def _split(whole: Corpus, held_out: float, seed: int) -> tuple[Iterator[np.ndarray], Iterator[np.ndarray]]:
    """Ids of the documents to learn, and of those held out."""
    count = len(whole.starts) - 1
    if count == 1:
        at = len(whole.ids) - max(2, round(len(whole.ids) * held_out))
        if at < 2:
            raise DataError(f"{len(whole.ids)} tokens are too few to learn from and to hold some out")
        return iter([whole.ids[:at]]), iter([whole.ids[at:]])
    left_out = min(max(1, round(count * held_out)), count - 1)
    order = np.random.Generator(np.random.Philox(seed)).permutation(count)
    chosen = np.zeros(count, bool)
    chosen[order[:left_out]] = True

    def those(which: np.ndarray) -> Iterator[np.ndarray]:
        return (whole.ids[whole.starts[index] : whole.starts[index + 1]] for index in np.flatnonzero(which))

    return those(~chosen), those(chosen)


def _write(path: Path, parts: Iterable[np.ndarray], dtype: np.dtype) -> None:
    """One file as documents come, and where each begins."""
    lengths = array("q", [0])
    with _own_folder(path.parent) as made:
        partial = made / path.name
        with open(partial, "wb") as file:
            for part in parts:
                file.write(part.astype(dtype).tobytes())
                lengths.append(len(part))
        starts = np.cumsum(lengths)
        np.save(partial.with_suffix(".starts.npy"), starts)
        about = {"form": _FORM, "dtype": dtype.str, "tokens": int(starts[-1]), "documents": len(starts) - 1}
        partial.with_suffix(".json").write_text(json.dumps(about) + "\n", encoding="utf-8")
        for suffix in (path.suffix, ".starts.npy", ".json"):  # the last says that the others are whole
            os.replace(partial.with_suffix(suffix), path.with_suffix(suffix))


@contextmanager
def _own_folder(beside: Path) -> Iterator[Path]:
    """A folder of this process alone, as several may write the same files at once; gone behind it."""
    try:
        beside.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=beside, prefix=".partial-") as made:
            yield Path(made)
    except OSError as error:
        raise DataError(f"{beside} could not be written: {error}", hint="look at the free space there") from None


def _key(paths: Sequence[str | Path], tokenizer: Tokenizer, *settings: object) -> str:
    digest = hashlib.sha256(" ".join(map(str, (_FORM, tokenizer.fingerprint, *settings))).encode())
    for path in paths:
        try:
            with open(path, "rb") as file:
                digest.update(_kind(Path(path)).encode() + hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise DataError(f"can't read {path}: {error.strerror}") from None
    return digest.hexdigest()[:32]
