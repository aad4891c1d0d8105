"""What a tokenizer is made from, and how Qwen's own vocabulary lies in files. No torch in here.

    Vocabulary                  the tokens, the control tokens and the rule that cuts text
    read_qwen, write_ranks      qwen.tiktoken and extra vocabularies: lines of `base64(token) rank`

Only byte-level byte-pair encoding is known: a token is a string of bytes, and of two possible merges the one whose
token has the lower id goes first. GGUF and tokenizer.json are read next door, in tokenizer_bytelevel.py.
"""

from __future__ import annotations

import json
import os
from binascii import a2b_base64, b2a_base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwenlet.errors import MissingTokenizerError, TokenizerError
from qwenlet.pretokenizer import QWEN, PreTokenizer

QWEN_FILE = "qwen.tiktoken"
QWEN_EXTRA_FILE = "qwen_extra.tiktoken"
QWEN_BASE_SIZE = 151_643  # tokens in qwen.tiktoken; the control tokens follow, and user words after them
QWEN_SPECIAL_TOKENS = {
    surface: QWEN_BASE_SIZE + index
    for index, surface in enumerate(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205))]
    )
}


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer needs to know.

    Attributes:
        ranks: bytes -> id of every token that merging may make; a lower id merges first.
        special_tokens: surface -> id of control tokens, which text becomes only where the caller allows it.
        added_tokens: surface -> id of tokens that are taken whole wherever they stand in text, without being control.
        unmergeable: id -> bytes of tokens that can be decoded but that merging never makes.
        size: highest id + 1.
        source: where it was read, for messages.
    """

    ranks: dict[bytes, int]
    special_tokens: dict[str, int]
    pre_tokenizer: PreTokenizer
    size: int
    source: str
    added_tokens: dict[str, int] = field(default_factory=dict)
    unmergeable: dict[int, bytes] = field(default_factory=dict)
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None


@dataclass(frozen=True)
class SkippedToken:
    """A line of an extra vocabulary that was not taken, and why."""

    token: bytes
    id: int
    reason: str


def read_qwen(path: Path, extra_paths: Sequence[Path] = ()) -> tuple[Vocabulary, list[SkippedToken]]:
    """Reads the published vocabulary and extra ones; an extra token or id that is taken is skipped, as published.

    Raises:
        MissingTokenizerError: a file is not there.
        TokenizerError: a bad line (file:line), or a vocabulary that is not Qwen's.
    """
    ranks = read_ranks(path)
    base_tokens = sum(rank < QWEN_BASE_SIZE for rank in ranks.values())
    if base_tokens != QWEN_BASE_SIZE:
        raise TokenizerError(
            f"{path} holds {base_tokens} of the {QWEN_BASE_SIZE} tokens of Qwen's vocabulary",
            hint="the file is truncated or not Qwen's; fetch it again (its sha256 begins with b2b1b8df)",
        )
    surfaces = {id: surface for surface, id in QWEN_SPECIAL_TOKENS.items()}
    for token, rank in ranks.items():
        if rank in surfaces:
            raise TokenizerError(f"{path} gives {token!r} the id {rank}, which belongs to {surfaces[rank]}")
    _check_all_bytes(ranks, path)

    skipped = []
    used = set(ranks.values()) | surfaces.keys()
    for extra_path in extra_paths:
        for token, rank in read_ranks(extra_path).items():
            if token in ranks:
                if ranks[token] != rank:
                    skipped.append(SkippedToken(token, rank, f"the token has the id {ranks[token]} already"))
            elif rank in used:
                skipped.append(SkippedToken(token, rank, f"the id {rank} is taken"))
            else:
                ranks[token] = rank
                used.add(rank)
    vocabulary = Vocabulary(
        ranks=ranks,
        special_tokens=dict(QWEN_SPECIAL_TOKENS),
        pre_tokenizer=QWEN,
        size=max(used) + 1,
        source=str(path),
        pad_id=QWEN_BASE_SIZE,  # <|endoftext|>, as the published generation_config.json pads
    )
    return vocabulary, skipped


def read_ranks(path: Path) -> dict[bytes, int]:
    """Reads lines of `base64(token) rank`. Raises TokenizerError with file:line for a bad or repeated one."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise MissingTokenizerError(f"there is no vocabulary file {path}") from None
    except OSError as error:
        raise TokenizerError(f"the vocabulary file {path} can't be read: {error.strerror}") from error
    lines = [line for line in data.splitlines() if line]
    try:
        ranks = {a2b_base64(token): int(rank) for token, rank in map(bytes.split, lines)}
    except ValueError:
        raise _first_bad_line(path, data) from None
    if len(ranks) != len(lines) or len(set(ranks.values())) != len(lines) or min(ranks.values(), default=0) < 0:
        raise _first_bad_line(path, data)
    return ranks


def _first_bad_line(path: Path, data: bytes) -> TokenizerError:
    """Finds what the quick reader stumbled over, now that time does not matter."""
    seen: dict[bytes | int, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line:
            continue
        try:
            encoded, digits = line.split()
            token, rank = a2b_base64(encoded, strict_mode=True), int(digits)
        except ValueError:
            return TokenizerError(f"{path}:{number} is {line[:80]!r}, expected 'base64 rank'")
        if rank < 0:
            return TokenizerError(f"{path}:{number} gives the rank {rank}, expected a number from 0 up")
        for value in (token, rank):
            if value in seen:
                return TokenizerError(f"{path}:{number} repeats {value!r} of line {seen[value]}")
            seen[value] = number
    return TokenizerError(f"{path} is not a vocabulary of 'base64 rank' lines")


def write_ranks(path: Path, ranks: Iterable[tuple[bytes, int]]) -> None:
    """Writes lines of `base64(token) rank` in the order of the ranks: all of the file or nothing."""
    lines = [
        b2a_base64(token, newline=False) + b" %d\n" % rank for token, rank in sorted(ranks, key=lambda row: row[1])
    ]
    write_atomically(path, b"".join(lines))


def write_atomically(path: Path, data: bytes) -> None:
    """Writes to a temporary file beside `path`, then renames it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _check_all_bytes(ranks: Mapping[bytes, int], path: Path) -> None:
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise TokenizerError(f"{path} has no token for the bytes {', '.join(f'0x{byte:02x}' for byte in missing[:8])}")


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises TokenizerError if the file holds anything else."""
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(raw, dict):
        raise TokenizerError(f"{path} holds {short_repr(raw)}, expected a JSON object")
    return raw


def short_repr(value: Any) -> str:
    """`repr`, cut to fit a message."""
    text = repr(value)
    return text if len(text) <= 160 else text[:157] + "..."
