"""Text to token ids and back, exact to the published Qwen tokenizer and to byte-level vocabularies in GGUF files.

    Tokenizer        encode, decode, padding; reads qwen.tiktoken, GGUF metadata, tokenizer.json
    StreamDecoder    ids one by one in, whole characters out

Control tokens never reach the merging code: text is cut at those surfaces that the caller allows, and everything else
is plain text. No torch in here, and nothing goes to the network.
"""

from __future__ import annotations

import codecs
import hashlib
import logging
import operator
import re
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import tiktoken

from qwenlet.errors import DisallowedSpecialError, MissingTokenizerError, TokenizerError
from qwenlet.tokenizer_bytelevel import read_gguf, read_tokenizer_json
from qwenlet.tokenizer_formats import (
    QWEN_BASE_SIZE,
    QWEN_EXTRA_FILE,
    QWEN_FILE,
    QWEN_SPECIAL_TOKENS,
    Vocabulary,
    read_json_object,
    read_qwen,
    write_ranks,
)

logger = logging.getLogger(__name__)

ErrorMode = Literal["replace", "ignore", "strict"]
PathLike = str | Path

# Embeddings have up to this many rows beyond the vocabulary (151,936 or 152,064 for 151,851 tokens).
PADDING_ROWS = 1024
_NO_TOKEN = b"\xff"  # a byte that is never valid UTF-8


class Tokenizer:
    """A byte-level vocabulary at work.

    An id without a token, as models have in the padding rows of their embedding, decodes as one invalid byte: U+FFFD
    under errors="replace", nothing under "ignore", an error under "strict".

    A vocabulary from a GGUF file or tokenizer.json may lack single bytes (SmolLM2 lacks 21, all of them control
    characters or parts of unassigned ones): they are left out of the ids, as other programs do.

    Attributes:
        special_tokens: surface -> id of the control tokens.
        vocab_size: highest id + 1. A model's embedding may have more rows.
        errors: what `decode` does with bytes that are not UTF-8, unless told otherwise.
        bos_id, eos_id, pad_id: ids that the vocabulary's file names so, or None.
    """

    def __init__(self, vocabulary: Vocabulary, *, errors: ErrorMode = "replace") -> None:
        self.errors = _checked_error_mode(errors)
        self.source = vocabulary.source
        self.vocab_size = vocabulary.size
        self.special_tokens = dict(vocabulary.special_tokens)
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.pad_id = vocabulary.pad_id
        self._pre_tokenizer = vocabulary.pre_tokenizer
        self._all_special = frozenset(self.special_tokens)
        self._special_ids = frozenset(self.special_tokens.values())
        self._added = frozenset(vocabulary.added_tokens)
        self._surfaces = self.special_tokens | vocabulary.added_tokens
        if "" in self._surfaces:
            raise TokenizerError(f"{self.source} has a control token without a surface: id {self._surfaces['']}")
        self._bytes = {id: token for token, id in vocabulary.ranks.items()}
        self._bytes |= vocabulary.unmergeable
        self._bytes |= {id: surface.encode("utf-8", "surrogateescape") for surface, id in self._surfaces.items()}
        # tiktoken needs all 256 bytes: those missing get ids beyond the vocabulary, dropped after encoding
        missing = [bytes([byte]) for byte in range(256) if bytes([byte]) not in vocabulary.ranks]
        self._lacks_bytes = bool(missing)
        ranks = vocabulary.ranks
        if missing:
            ranks = ranks | {byte: vocabulary.size + n for n, byte in enumerate(missing)}
        self._bpe = tiktoken.Encoding(
            "qwenlet",
            pat_str=vocabulary.pre_tokenizer.engine_pattern,
            mergeable_ranks=ranks,
            special_tokens={},
        )

    # ------------------------------------------------------------------------------------------------------ reading

    @classmethod
    def from_file(
        cls,
        path: PathLike,
        *,
        extra_vocab_file: PathLike | Sequence[PathLike] | None = None,
        errors: ErrorMode = "replace",
    ) -> Tokenizer:
        """Reads the published `qwen.tiktoken`, and words added to it.

        Extra tokens and ids that are taken already are skipped, as published, with a line in the log.

        Raises:
            MissingTokenizerError: a file is not there.
            TokenizerError: a file is damaged or not Qwen's.
        """
        if extra_vocab_file is None:
            extra_vocab_file = ()
        elif isinstance(extra_vocab_file, (str, Path)):
            extra_vocab_file = (extra_vocab_file,)
        return cls(_read_qwen(Path(path), [Path(extra) for extra in extra_vocab_file]), errors=errors)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], source: PathLike) -> Tokenizer:
        """Reads a byte-level vocabulary from GGUF metadata (`gguf_header.read_header(path).metadata`).

        Raises:
            MissingTokenizerError: there is none.
            TokenizerError: of another kind, or damaged.
        """
        return cls(read_gguf(metadata, str(source)))

    @classmethod
    def from_folder(cls, folder: PathLike) -> Tokenizer:
        """Reads the tokenizer of a checkpoint folder: qwen.tiktoken with its extra words, else tokenizer.json.

        Raises:
            MissingTokenizerError: the folder has neither.
            TokenizerError: a file is damaged, or of a kind we don't read.
        """
        return cls(read_folder(folder))

    def save(self, folder: PathLike) -> None:
        """Writes qwen.tiktoken, and qwen_extra.tiktoken if there are extra words, in the published format.

        Raises:
            TokenizerError: the vocabulary is not Qwen's, or the folder holds extra words this tokenizer lacks.
        """
        if not self.is_qwen:
            raise TokenizerError(
                f"the vocabulary of {self.source} is not Qwen-1's, so it can't be written as {QWEN_FILE}",
                hint="keep the file it came from",
            )
        folder = Path(folder)
        words = [(token, id) for id, token in self._bytes.items() if id not in self._special_ids]
        extra = [(token, id) for token, id in words if id > QWEN_BASE_SIZE]
        if not extra and (folder / QWEN_EXTRA_FILE).exists():
            raise TokenizerError(
                f"{folder / QWEN_EXTRA_FILE} holds words that this tokenizer lacks",
                hint="save to another folder, or move that file away",
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_ranks(folder / QWEN_FILE, [(token, id) for token, id in words if id < QWEN_BASE_SIZE])
        if extra:
            write_ranks(folder / QWEN_EXTRA_FILE, extra)

    # ----------------------------------------------------------------------------------------------------- encoding

    def encode(
        self,
        text: str,
        allowed_special: Literal["all"] | Set[str] = "all",
        disallowed_special: Literal["all"] | Collection[str] = (),
    ) -> list[int]:
        """Token ids of `text`.

        Args:
            allowed_special: control tokens whose surfaces in the text become control ids; set() takes all text as
                plain text, which is what text from outside needs.
            disallowed_special: surfaces that must not be in the text; "all" means all control tokens. What is
                allowed is never disallowed.

        Raises:
            DisallowedSpecialError: the text holds a disallowed surface.
            TokenizerError: the text holds half a surrogate pair, or `allowed_special` names no control token.
        """
        text = self._pre_tokenizer.normalize(_checked_text(text))
        allowed = (
            self._all_special if allowed_special == "all" else _checked_surfaces(allowed_special, "allowed_special")
        )
        if unknown := allowed - self._all_special:
            raise TokenizerError(f"allowed_special names {sorted(unknown)[0]!r}, which is no control token here")
        self._refuse_disallowed(text, allowed, disallowed_special)
        surfaces = allowed | self._added
        if not surfaces:
            return self.encode_plain(text)
        ids: list[int] = []
        for index, part in enumerate(_any_of(surfaces).split(text)):
            if index % 2:
                ids.append(self._surfaces[part])
            elif part:
                ids += self.encode_plain(part)
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of exactly these characters: no normalisation, and no surface is looked for."""
        ids = [id for chunk in self._pre_tokenizer.chunks(text) for id in self._bpe.encode_ordinary(chunk)]
        return [id for id in ids if id < self.vocab_size] if self._lacks_bytes else ids

    def _refuse_disallowed(self, text: str, allowed: Set[str], disallowed: Literal["all"] | Collection[str]) -> None:
        if not disallowed:
            return
        surfaces = self._all_special if disallowed == "all" else _checked_surfaces(disallowed, "disallowed_special")
        surfaces = surfaces - allowed
        if surfaces and (found := _any_of(surfaces).search(text)):
            raise DisallowedSpecialError(
                f"the text holds {found.group()} at character {found.start()}, which is disallowed",
                hint="allowed_special makes it a control token; disallowed_special=() takes it as plain text",
            )

    def pieces(self, text: str) -> list[str]:
        """`text` normalised and cut where merging stops; control tokens are plain text here."""
        return self._pre_tokenizer.pieces(_checked_text(text))

    def normalize(self, text: str) -> str:
        """`text` as the model sees it: NFC for Qwen, unchanged for others."""
        return self._pre_tokenizer.normalize(text)

    # ----------------------------------------------------------------------------------------------------- decoding

    def decode(
        self, ids: Iterable[SupportsIndex], skip_special_tokens: bool = False, errors: ErrorMode | None = None
    ) -> str:
        """Text of `ids`. `skip_special_tokens` drops control tokens, and no others.

        Raises:
            TokenizerError: an id that no model of this vocabulary can have, or invalid UTF-8 under errors="strict".
        """
        mode = self.errors if errors is None else _checked_error_mode(errors)
        try:
            numbers = list(ids)
        except TypeError:
            raise TokenizerError(f"decode got {ids!r}, expected a list of token ids") from None
        data = b"".join(
            [self.decoded_bytes(id) for id in numbers if not (skip_special_tokens and self.is_special(id))],
        )
        try:
            return data.decode("utf-8", mode)
        except UnicodeDecodeError as error:
            raise TokenizerError(
                f"the ids make {data[error.start : error.end]!r} at byte {error.start}, which is not UTF-8",
                hint='errors="replace" puts U+FFFD in its place',
            ) from None

    def token_bytes(self, id: SupportsIndex) -> bytes:
        """The bytes of one token. Raises TokenizerError if `id` has none."""
        token = self._bytes.get(_checked_id(id))
        if token is None:
            raise TokenizerError(f"there is no token {id}; the vocabulary ends at {self.vocab_size - 1}")
        return token

    def token_ids(self) -> Iterable[int]:
        """Ids that have a token."""
        return self._bytes.keys()

    def id_of(self, token: bytes) -> int | None:
        """The id of these bytes as one token that is no control token, or None."""
        try:
            return self._bpe.encode_single_token(token)
        except KeyError:
            return None

    def is_special(self, id: SupportsIndex) -> bool:
        """True for control tokens."""
        return _checked_id(id) in self._special_ids

    def decoded_bytes(self, id: SupportsIndex) -> bytes:
        """What `decode` writes for one token: its bytes, or one that is no UTF-8 for a row beyond the vocabulary.

        Raises TokenizerError for an id that no model of this vocabulary can have.
        """
        number = _checked_id(id)
        token = self._bytes.get(number)
        if token is not None:
            return token
        if not 0 <= number < self.vocab_size + PADDING_ROWS:
            raise TokenizerError(f"token id {number} is out of range; ids run from 0 to {self.vocab_size - 1}")
        return _NO_TOKEN

    # -------------------------------------------------------------------------------------------------------- batches

    def pad(
        self, batch: Sequence[Sequence[int]], side: Literal["left", "right"], pad_id: int | None = None
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Brings rows to the length of the longest: (ids, mask), where the mask is 0 on padding.

        `pad_id` defaults to the id that the vocabulary names for padding (Qwen: <|endoftext|>).
        """
        if side not in ("left", "right"):
            raise TokenizerError(f"side is {side!r}, expected 'left' or 'right'")
        filler = self.pad_id if pad_id is None else _checked_id(pad_id)
        if filler is None:
            raise TokenizerError("the vocabulary names no padding token", hint="pass pad_id")
        width = max(map(len, batch), default=0)
        ids, mask = [], []
        for row in batch:
            padding = width - len(row)
            before, after = (padding, 0) if side == "left" else (0, padding)
            ids.append([filler] * before + list(row) + [filler] * after)
            mask.append([0] * before + [1] * len(row) + [0] * after)
        return ids, mask

    # ---------------------------------------------------------------------------------------- well-known control ids

    @cached_property
    def fingerprint(self) -> str:
        """The same for vocabularies that give every text the same ids."""
        digest = hashlib.sha256(self._pre_tokenizer.engine_pattern.encode())
        for id in sorted(self._bytes):
            digest.update(b"%d %d " % (id, len(self._bytes[id])) + self._bytes[id])
        digest.update(repr(sorted(self._surfaces.items())).encode())
        return digest.hexdigest()

    @property
    def eod_id(self) -> int | None:
        return self.special_tokens.get("<|endoftext|>")

    @property
    def im_start_id(self) -> int | None:
        return self.special_tokens.get("<|im_start|>")

    @property
    def im_end_id(self) -> int | None:
        return self.special_tokens.get("<|im_end|>")

    @property
    def is_qwen(self) -> bool:
        """True for Qwen-1's own vocabulary, with or without extra words."""
        return self.special_tokens == QWEN_SPECIAL_TOKENS

    def __repr__(self) -> str:
        return f"<Tokenizer {self.source}, {self.vocab_size} tokens>"


class StreamDecoder:
    """Turns ids into text as they come: what is pushed and flushed adds up to `decode(errors="replace")` of all ids.

    Only an unfinished UTF-8 sequence is held back; each byte is looked at once.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that `token_id` completes, often one word, sometimes none."""
        if self._skip_special_tokens and self._tokenizer.is_special(token_id):
            return ""
        return self._utf8.decode(self._tokenizer.decoded_bytes(token_id))

    def flush(self) -> str:
        """What was held back, as U+FFFD; afterwards the decoder is as new."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def read_folder(folder: PathLike) -> Vocabulary:
    """The vocabulary of a checkpoint folder; raises as `Tokenizer.from_folder`."""
    folder = Path(folder)
    if (folder / QWEN_FILE).exists():
        return _read_qwen(folder / QWEN_FILE, _extra_files(folder))
    if (folder / "tokenizer.json").exists():
        return read_tokenizer_json(folder / "tokenizer.json")
    raise MissingTokenizerError(
        f"{folder} has no tokenizer: neither {QWEN_FILE} nor tokenizer.json is there",
        hint="copy the file from the folder the checkpoint came from; without it only token ids can be used",
    )


def _read_qwen(path: Path, extra_paths: Sequence[Path]) -> Vocabulary:
    vocabulary, skipped = read_qwen(path, extra_paths)
    for line in skipped:
        logger.warning("extra token %r with id %d is skipped: %s", line.token, line.id, line.reason)
    return vocabulary


def _extra_files(folder: Path) -> list[Path]:
    """qwen_extra.tiktoken if it is there, and the file that tokenizer_config.json names."""
    names = [QWEN_EXTRA_FILE] if (folder / QWEN_EXTRA_FILE).exists() else []
    config = folder / "tokenizer_config.json"
    named = read_json_object(config).get("extra_vocab_file") if config.exists() else None
    if named is not None:
        if not isinstance(named, str) or Path(named).name != named:
            raise TokenizerError(f"{config} names the extra_vocab_file {named!r}, expected a file in the same folder")
        if named not in names:
            names.append(named)
    return [folder / name for name in names]


@lru_cache(maxsize=32)
def _any_of(surfaces: frozenset[str]) -> re.Pattern[str]:
    """Finds any of `surfaces` as its group 1, the longest where several begin at one place."""
    return re.compile("(" + "|".join(map(re.escape, sorted(surfaces, key=len, reverse=True))) + ")")


def _checked_surfaces(surfaces: Any, argument: str) -> frozenset[str]:
    if isinstance(surfaces, str) or not isinstance(surfaces, Collection):
        raise TokenizerError(f"{argument} is {surfaces!r}, expected 'all' or a set of control tokens")
    if not all(isinstance(surface, str) and surface for surface in surfaces):
        raise TokenizerError(f"{argument} holds what is no text or empty: {surfaces!r}")
    return frozenset(surfaces)


def _checked_text(text: Any) -> str:
    if not isinstance(text, str):
        raise TokenizerError(f"the text is a {type(text).__name__}, expected str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text holds half a surrogate pair, U+{ord(text[error.start]):04X}, at character {error.start}",
            hint="it was probably decoded from bytes that are not UTF-8",
        ) from None
    return text


def _checked_id(id: Any) -> int:
    if type(id) is int:
        return id
    try:
        if not isinstance(id, bool):
            return operator.index(id)
    except TypeError:
        pass
    raise TokenizerError(f"a token id is {id!r}, expected a whole number")


def _checked_error_mode(errors: Any) -> ErrorMode:
    if errors not in ("replace", "ignore", "strict"):
        raise TokenizerError(f"errors is {errors!r}, expected 'replace', 'ignore' or 'strict'")
    mode: ErrorMode = errors
    return mode
