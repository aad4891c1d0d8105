"""Documents -> one file of token ids, which a run maps instead of holding it.

    build    files -> OUT/train.tokens, OUT/held-out.tokens and their starts; done once for the same files and settings
    encode   files -> OUT/whole.tokens, all of them
    Corpus   a file of tokens, mapped

Documents are records of .jsonl ({"text": ...}), and in plain text what stands between lines `<|endoftext|>`, else the
whole file. Each ends with the token that ends a text. A document is one sample, or as many pieces of `max_length` as it
takes: no token sees another document. No torch in here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwenlet.errors import DataError
from qwenlet.tokenizer import Tokenizer
from qwenlet.train.records import Text, read_record
from qwenlet.train.samples import Report, Samples

_SEPARATOR = "<|endoftext|>"
_FORM = 1
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
        """Every document in pieces of at most `max_length`; one token alone foretells nothing and is left out of a
        batch's count, not of the file."""
        cuts = [np.arange(first, last, max_length) for first, last in zip(self.starts, self.starts[1:], strict=False)]
        starts = np.concatenate([*cuts, self.starts[-1:]])
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
    key = _key(paths, tokenizer, held_out, seed)
    work = folder / key
    names = (work / "train.tokens", work / "held-out.tokens")
    if not all(name.with_suffix(".json").exists() for name in names):
        kept, left_out = _split(_all_encoded(paths, tokenizer, threads), held_out, seed)
        for path, documents in zip(names, (kept, left_out), strict=True):
            _write(path, documents, _dtype(tokenizer))
    return Corpus.open(names[0]), Corpus.open(names[1])


def encode(paths: Sequence[str | Path], tokenizer: Tokenizer, folder: Path, *, threads: int | None = None) -> Corpus:
    """All documents of some files, as `build` does it and with its errors."""
    path = folder / _key(paths, tokenizer, "whole") / "whole.tokens"
    if not path.with_suffix(".json").exists():
        _write(path, _all_encoded(paths, tokenizer, threads), _dtype(tokenizer))
    return Corpus.open(path)


def documents(paths: Sequence[str | Path]) -> Iterator[str]:
    """Texts of some files. Raises DataError with file and line for what is no text."""
    for path in map(Path, paths):
        try:
            if path.suffix in (".jsonl", ".ndjson"):
                with open(path, encoding="utf-8-sig") as file:
                    for number, line in enumerate(file, 1):
                        if line.strip():
                            yield _record_text(line, f"{path}:{number}")
            else:
                text = path.read_text(encoding="utf-8-sig")
                parts = text.split(f"\n{_SEPARATOR}") if f"\n{_SEPARATOR}" in text else [text]
                yield from (part.strip("\n") for part in parts if part.strip())
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"can't read {path} as UTF-8 text: {error}") from None


def _record_text(line: str, where: str) -> str:
    try:
        record = read_record(json.loads(line), where)
    except ValueError as error:  # RequestError too
        raise DataError(f"{where}: {getattr(error, 'message', error)}") from None
    if not isinstance(record, Text):
        raise DataError(f"{where} is a dialogue", hint="dialogues are for qwenlet finetune; here a record has a text")
    return record.prompt + record.text


def _all_encoded(paths: Sequence[str | Path], tokenizer: Tokenizer, threads: int | None) -> list[np.ndarray]:
    encoded = list(_encoded(paths, tokenizer, threads or os.cpu_count() or 1))
    if not encoded:
        raise DataError(f"there is no text in {', '.join(map(str, paths))}")
    return encoded


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


def _split(encoded: list[np.ndarray], held_out: float, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    if len(encoded) == 1:
        whole = encoded[0]
        at = len(whole) - max(2, round(len(whole) * held_out))
        if at < 2:
            raise DataError(f"{len(whole)} tokens are too few to learn from and to hold some out")
        return [whole[:at]], [whole[at:]]
    count = min(max(1, round(len(encoded) * held_out)), len(encoded) - 1)
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(encoded))
    chosen = set(order[:count].tolist())
    return (
        [ids for index, ids in enumerate(encoded) if index not in chosen],
        [ids for index, ids in enumerate(encoded) if index in chosen],
    )


def _write(path: Path, parts: list[np.ndarray], dtype: np.dtype) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with open(partial, "wb") as file:
            for part in parts:
                file.write(part.astype(dtype).tobytes())
        os.replace(partial, path)
        starts = np.cumsum([0, *(len(part) for part in parts)])
        np.save(path.with_suffix(".starts.npy"), starts)
        about = {"form": _FORM, "dtype": dtype.str, "tokens": int(starts[-1]), "documents": len(parts)}
        partial.write_text(json.dumps(about) + "\n", encoding="utf-8")
        os.replace(partial, path.with_suffix(".json"))  # last: it says that the others are whole
    except OSError as error:
        raise DataError(f"{path} could not be written: {error}", hint="look at the free space there") from None


def _key(paths: Sequence[str | Path], tokenizer: Tokenizer, *settings: object) -> str:
    digest = hashlib.sha256(" ".join(map(str, (_FORM, tokenizer.fingerprint, *settings))).encode())
    for path in paths:
        try:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise DataError(f"can't read {path}: {error.strerror}") from None
    return digest.hexdigest()[:32]
