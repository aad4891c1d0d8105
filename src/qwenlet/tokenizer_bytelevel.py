"""Byte-level vocabularies made elsewhere: GGUF metadata and tokenizer.json. No torch in here.

Each reader returns one `Vocabulary`, and refuses by name what it would have to guess; the way back is in
tokenizer_export.py. SentencePiece, WordPiece and unigram vocabularies are left out, and so are templates that add
tokens to every text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwenlet.errors import MissingTokenizerError, TokenizerError
from qwenlet.pretokenizer import GPT2, QWEN, SMOLLM, PreTokenizer
from qwenlet.tokenizer_formats import Vocabulary, read_json_object, short_repr

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # GGUF token types
_PRE_TOKENIZERS = {"smollm": SMOLLM, "qwen2": QWEN, "gpt-2": GPT2, "default": GPT2}


def read_gguf(metadata: Mapping[str, Any], source: str) -> Vocabulary:
    """Reads the byte-level vocabulary in the metadata of a GGUF file.

    Raises:
        MissingTokenizerError: the file has none.
        TokenizerError: another kind of vocabulary, or a pre-tokenizer we don't know.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        raise MissingTokenizerError(f"{source} has no tokenizer.ggml.model, so only token ids can be used with it")
    if kind != "gpt2":
        raise TokenizerError(f"{source} has a tokenizer of the kind {kind!r}; byte-level BPE ('gpt2') is read")
    if metadata.get("tokenizer.ggml.add_bos_token"):
        raise TokenizerError(f"{source} has tokenizer.ggml.add_bos_token true, which is not implemented")
    tokens: list[str] = _gguf_list(metadata, "tokenizer.ggml.tokens", str, source)
    types: list[int] = _gguf_list(metadata, "tokenizer.ggml.token_type", int, source)
    merges: list[str] = _gguf_list(metadata, "tokenizer.ggml.merges", str, source)
    if len(types) != len(tokens):
        raise TokenizerError(f"{source} has {len(types)} token types for {len(tokens)} tokens")
    by_type: dict[int, dict[str, int]] = {kind: {} for kind in (_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED)}
    for id, (token, token_type) in enumerate(zip(tokens, types, strict=True)):
        if token_type not in by_type:
            raise TokenizerError(
                f"{source} gives token {id} ({token!r}) the type {token_type}, which is not understood"
            )
        if token in by_type[token_type]:
            raise TokenizerError(f"{source} has the token {token!r} twice: {by_type[token_type][token]} and {id}")
        by_type[token_type][token] = id
    ranks, unmergeable = _merge_ranks(by_type[_NORMAL], merges, source)
    return Vocabulary(
        ranks=ranks,
        unmergeable=unmergeable,
        special_tokens=by_type[_UNKNOWN] | by_type[_CONTROL],
        added_tokens=by_type[_USER_DEFINED],
        pre_tokenizer=_gguf_pre_tokenizer(metadata, source),
        size=len(tokens),
        source=source,
        bos_id=_gguf_id(metadata, "bos", len(tokens), source),
        eos_id=_gguf_id(metadata, "eos", len(tokens), source),
        pad_id=_gguf_id(metadata, "padding", len(tokens), source),
    )


def _gguf_pre_tokenizer(metadata: Mapping[str, Any], source: str) -> PreTokenizer:
    name = str(metadata.get("tokenizer.ggml.pre", "default"))
    if name not in _PRE_TOKENIZERS:
        raise TokenizerError(
            f"{source} cuts text by the pre-tokenizer {name!r}; known are {', '.join(sorted(_PRE_TOKENIZERS))}"
        )
    if name == "default" and metadata.get("general.architecture") in ("qwen", "qwen2"):
        return QWEN  # files older than the key
    return _PRE_TOKENIZERS[name]


def _gguf_list(metadata: Mapping[str, Any], key: str, kind: type, source: str) -> list[Any]:
    values = metadata.get(key)
    if not isinstance(values, list) or not values or not isinstance(values[0], kind):
        raise TokenizerError(f"{source} has no list {key}, which its tokenizer needs")
    return values


def _gguf_id(metadata: Mapping[str, Any], role: str, size: int, source: str) -> int | None:
    key = f"tokenizer.ggml.{role}_token_id"
    id = metadata.get(key)
    if id is not None and not (isinstance(id, int) and 0 <= id < size):
        raise TokenizerError(f"{source} has {key} {id!r}, expected an id below {size}")
    return id


def read_tokenizer_json(path: Path) -> Vocabulary:
    """Reads a byte-level `tokenizer.json`, and the bos, eos and pad tokens of `tokenizer_config.json` beside it.

    Raises:
        TokenizerError: not JSON, or a part of it asks for something we don't do; the part is named.
    """
    raw = read_json_object(path)
    model, source = raw.get("model"), str(path)
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) or not model["vocab"]:
        raise TokenizerError(f"{path} has no model with a vocab, so it is no byte-pair tokenizer")

    def require(part: str, value: Any, *accepted: Any) -> None:
        if value not in accepted:
            raise TokenizerError(
                f"{path} has {part} {short_repr(value)}; understood: {', '.join(map(short_repr, accepted))}"
            )

    require("model.type", model.get("type"), "BPE")
    require("model.dropout", model.get("dropout"), None, 0.0)
    require("model.continuing_subword_prefix", model.get("continuing_subword_prefix"), None, "")
    require("model.end_of_word_suffix", model.get("end_of_word_suffix"), None, "")
    require("model.byte_fallback", model.get("byte_fallback", False), False)
    require("model.ignore_merges", model.get("ignore_merges", False), False)
    require("decoder.type", _type_of(raw.get("decoder")), "ByteLevel")
    require("post_processor.type", _type_of(raw.get("post_processor")), None, "ByteLevel")
    require("truncation", raw.get("truncation"), None)
    pre_tokenizer = _json_pre_tokenizer(raw.get("pre_tokenizer"), source)
    require("normalizer.type", _type_of(raw.get("normalizer")), "NFC" if pre_tokenizer.nfc else None)

    surfaces: dict[bool, dict[str, int]] = {True: {}, False: {}}
    for token in raw.get("added_tokens") or []:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str) or not _is_id(token.get("id")):
            raise TokenizerError(f"{path} has the added token {short_repr(token)}, expected a content and an id")
        for flag in ("lstrip", "rstrip", "single_word"):
            require(f"added_tokens {token['content']!r} {flag}", token.get(flag, False), False)
        surfaces[bool(token.get("special"))][token["content"]] = token["id"]
    added_ids = {*surfaces[True].values(), *surfaces[False].values()}
    vocab = {token: id for token, id in model["vocab"].items() if id not in added_ids}
    if not all(map(_is_id, vocab.values())) or len(set(vocab.values())) != len(vocab):
        raise TokenizerError(f"{path} has a vocab whose ids are not different whole numbers from 0 up")
    merges = list(map(_merge_text, model.get("merges") or []))
    ranks, unmergeable = _merge_ranks(vocab, merges, source)
    named = _named_tokens(path.parent / "tokenizer_config.json", surfaces[True] | surfaces[False])
    return Vocabulary(
        ranks=ranks,
        unmergeable=unmergeable,
        special_tokens=surfaces[True],
        added_tokens=surfaces[False],
        pre_tokenizer=pre_tokenizer,
        size=max([*vocab.values(), *added_ids]) + 1,
        source=source,
        bos_id=named.get("bos_token"),
        eos_id=named.get("eos_token"),
        pad_id=named.get("pad_token"),
    )


def _json_pre_tokenizer(raw: Any, source: str) -> PreTokenizer:
    """Recognises the three rules we know by their parts."""
    parts = raw.get("pretokenizers") or [] if _type_of(raw) == "Sequence" else [raw]
    shape = [_type_of(part) for part in parts]
    if shape[-1:] == ["ByteLevel"] and not parts[-1].get("add_prefix_space", True):
        first, gpt2_rule = parts[0], parts[-1].get("use_regex", True)
        if gpt2_rule and shape == ["ByteLevel"]:
            return GPT2
        if gpt2_rule and shape == ["Digits", "ByteLevel"] and first.get("individual_digits"):
            return SMOLLM
        split = {name: first.get(name) for name in ("pattern", "behavior", "invert")}
        isolated = {"pattern": {"Regex": QWEN.pattern}, "behavior": "Isolated", "invert": False}
        if not gpt2_rule and shape == ["Split", "ByteLevel"] and split == isolated:
            return QWEN
    raise TokenizerError(
        f"{source} cuts text by the pre_tokenizer {short_repr(raw)}, which is none of "
        f"{', '.join(rule.name for rule in (QWEN, GPT2, SMOLLM))}"
    )


def _type_of(part: Any) -> Any:
    """The type of a part of tokenizer.json; what is no part comes back as text that is no type either."""
    if isinstance(part, dict):
        return part.get("type")
    return None if part is None else short_repr(part)


def _merge_text(merge: Any) -> str:
    """A merge as "left right"; newer files hold pairs."""
    return " ".join(map(str, merge)) if isinstance(merge, list) else str(merge)


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 0


def _named_tokens(path: Path, surfaces: Mapping[str, int]) -> dict[str, int]:
    """Ids of the tokens that tokenizer_config.json calls bos, eos and pad."""
    if not path.exists():
        return {}
    raw, named = read_json_object(path), {}
    for role in ("bos_token", "eos_token", "pad_token"):
        surface = raw.get(role)
        surface = surface.get("content") if isinstance(surface, dict) else surface
        if surface is not None:
            if surface not in surfaces:
                raise TokenizerError(f"{path} names {surface!r} as {role}, which the vocabulary does not hold")
            named[role] = surfaces[surface]
    return named


# A byte-level vocabulary spells each byte as one printable character: itself where it prints, else U+0100 upwards.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(0x100) if byte not in _PRINTABLE]
# what is no spelling of a byte is sent out of Latin-1, so that encoding it fails
_BYTE_OF_SPELLING = dict.fromkeys(_HIDDEN, 0xFFFD) | {0x100 + n: byte for n, byte in enumerate(_HIDDEN)}


def _merge_ranks(
    tokens: Mapping[str, int], merges: Sequence[str], source: str
) -> tuple[dict[bytes, int], dict[int, bytes]]:
    """Splits byte-level tokens into those that merging makes (bytes -> id) and those it never makes (id -> bytes).

    Merging by token id equals merging by the list if the list is in the order of its tokens' ids, as training makes
    it: then every token is made from the very pair that the list names.
    """
    made: set[int] = set()
    previous = -1
    for number, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        id = tokens.get(left + right, -1)
        if id < 0 or left not in tokens or right not in tokens:
            raise TokenizerError(f"{source} has the merge {merge!r} (number {number}) of tokens it does not hold")
        if id <= previous:
            raise TokenizerError(
                f"{source} has the merge {merge!r} (number {number}) out of the order of its token ids"
            )
        made.add(id)
        previous = id
    ranks: dict[bytes, int] = {}
    unmergeable: dict[int, bytes] = {}
    for spelling, id in tokens.items():
        try:
            token = spelling.translate(_BYTE_OF_SPELLING).encode("latin-1")
        except UnicodeEncodeError:
            raise TokenizerError(f"{source} has token {id} ({spelling!r}), which does not spell bytes") from None
        if id in made or len(token) == 1:
            ranks[token] = id
        else:
            unmergeable[id] = token
    return ranks, unmergeable
