"""A vocabulary the way other programs keep it: tokenizer.json, and GGUF metadata. No torch in here.

    Spelled          tokens by id, spelled as text, what kind each is, and the merges that make them
    tokenizer_json   what `tokenizers` and everything built on it reads
    gguf_metadata    what llama.cpp reads

Merging by the lowest id (qwen.tiktoken) and merging by a list of pairs (everywhere else) give the same ids if the list
names, for each token in the order of ids, the one pair that merging itself would make it from: what happens inside a
token's bytes is settled by lower ids alone, whatever stands around them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from qwenlet.errors import TokenizerError
from qwenlet.pretokenizer import GPT2, QWEN, SMOLLM
from qwenlet.tokenizer_formats import Vocabulary

# GGUF token types
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(0x100) if byte not in _PRINTABLE]
# a byte as one printable character: itself where it prints, else U+0100 upwards
_SPELLING = {byte: chr(0x100 + n) for n, byte in enumerate(_HIDDEN)}


@dataclass(frozen=True)
class Spelled:
    """Tokens as text.

    Attributes:
        tokens: by id; an id without a token is "[PAD<id>]".
        types: GGUF's number for each: normal, control, user-defined or unused.
        merges: "left right", in the order of the ids they make.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]

    @classmethod
    def of(cls, vocabulary: Vocabulary, rows: int = 0) -> Spelled:
        """`rows`: at least so many tokens, as a model's embedding has.

        Raises:
            TokenizerError: a token that no merge of two others makes.
        """
        size = max(vocabulary.size, rows)
        tokens, types = [f"[PAD{id}]" for id in range(size)], [UNUSED] * size
        for token, id in vocabulary.ranks.items():
            tokens[id], types[id] = spell(token), NORMAL
        for id, token in vocabulary.unmergeable.items():
            tokens[id], types[id] = spell(token), NORMAL
        for surfaces, kind in ((vocabulary.special_tokens, CONTROL), (vocabulary.added_tokens, USER_DEFINED)):
            for surface, id in surfaces.items():
                tokens[id], types[id] = surface, kind
        pairs = (merge_of(token, vocabulary) for token, _ in sorted(vocabulary.ranks.items(), key=lambda row: row[1]))
        return cls(tokens, types, [f"{spell(left)} {spell(right)}" for left, right in filter(None, pairs)])


def spell(token: bytes) -> str:
    return token.decode("latin-1").translate(_SPELLING)


def merge_of(token: bytes, vocabulary: Vocabulary) -> tuple[bytes, bytes] | None:
    """The two tokens that merging makes this one from; None for a single byte.

    Raises:
        TokenizerError: merging does not end in two pieces.
    """
    if len(token) == 1:
        return None
    ranks, own = vocabulary.ranks, vocabulary.ranks[token]
    halves = ((token[:at], token[at:]) for at in range(1, len(token)))
    found = [(a, b) for a, b in halves if ranks.get(a, own) < own and ranks.get(b, own) < own]
    if len(found) == 1:
        return found[0]  # four of five tokens: there is but one way
    pieces = [token[at : at + 1] for at in range(len(token))]
    while len(pieces) > 2:
        joined = [ranks.get(a + b, own) for a, b in pairwise(pieces)]
        best = min(joined)
        if best >= own:
            break
        at = joined.index(best)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    if len(pieces) != 2:
        raise TokenizerError(
            f"token {own} ({token!r}) of {vocabulary.source} is made by no merge of two others",
            hint="other programs merge by a list of pairs; leave this word out of the vocabulary",
        )
    return pieces[0], pieces[1]


_TAKEN_WHOLE = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_SPLIT = {"type": "Split", "pattern": {"Regex": QWEN.pattern}, "behavior": "Isolated", "invert": False}
_PRE_TOKENIZER_JSON: dict[str, dict[str, Any]] = {
    GPT2.name: _BYTE_LEVEL,
    SMOLLM.name: {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL]},
    QWEN.name: {"type": "Sequence", "pretokenizers": [_SPLIT, _BYTE_LEVEL | {"use_regex": False}]},
}


def tokenizer_json(vocabulary: Vocabulary, chat_template: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tokenizer.json, the named tokens and the template for tokenizer_config.json).

    Raises:
        TokenizerError: as `Spelled.of`.
    """
    spelled = Spelled.of(vocabulary)
    whole = {id: kind == CONTROL for id, kind in enumerate(spelled.types) if kind in (CONTROL, USER_DEFINED)}
    rule = vocabulary.pre_tokenizer
    raw = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": spelled.tokens[id], "special": special, **_TAKEN_WHOLE}
            for id, special in whole.items()
        ],
        "normalizer": {"type": "NFC"} if rule.nfc else None,
        "pre_tokenizer": _PRE_TOKENIZER_JSON[rule.name],
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {spelled.tokens[id]: id for id, kind in enumerate(spelled.types) if kind == NORMAL},
            "merges": spelled.merges,
        },
    }
    named = {"bos_token": vocabulary.bos_id, "eos_token": vocabulary.eos_id, "pad_token": vocabulary.pad_id}
    settings = {role: spelled.tokens[id] for role, id in named.items() if id in whole}
    if chat_template:
        settings["chat_template"] = chat_template
    return raw, settings


def gguf_metadata(vocabulary: Vocabulary, rows: int, named: Mapping[str, int | None]) -> dict[str, Any]:
    """The keys under `tokenizer.ggml.`, without that prefix.

    Args:
        rows: tokens of the model's embedding, which llama.cpp wants a name for each.
        named: ids for the roles bos, eos, eot, padding; None leaves a role out.
    """
    spelled = Spelled.of(vocabulary, rows)
    return {
        "model": "gpt2",
        "pre": vocabulary.pre_tokenizer.name,
        "tokens": spelled.tokens,
        "token_type": spelled.types,
        "merges": spelled.merges,
        **{f"{role}_token_id": id for role, id in named.items() if id is not None},
        "add_bos_token": False,
    }
