"""Byte-level vocabularies in GGUF metadata and tokenizer.json: the demo model's golden ids, and refusals by name."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest

from qwenlet.errors import MissingTokenizerError, TokenizerError
from qwenlet.gguf_header import read_header
from qwenlet.pretokenizer import QWEN
from qwenlet.tokenizer import Tokenizer

PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
HIDDEN = [byte for byte in range(0x100) if byte not in PRINTABLE]
SPELLING = {byte: chr(byte) for byte in PRINTABLE} | {byte: chr(0x100 + n) for n, byte in enumerate(HIDDEN)}
MERGES = ["Ġ h", "i i", "Ġh ii"]


def metadata(**changes: Any) -> dict[str, Any]:
    """A whole vocabulary in small: two control tokens, 256 bytes, three merges, a tool tag, padding."""
    tokens = ["<|im_start|>", "<|im_end|>", *SPELLING.values(), "Ġh", "ii", "Ġhii", "<tool>", "[PAD0]"]
    values = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [3, 3] + [1] * 259 + [4, 5],
        "merges": MERGES,
        "eos_token_id": 1,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (values | changes).items() if value is not None}


def tokenizer_json(**changes: Any) -> dict[str, Any]:
    """The same vocabulary as tokenizer.json, with Qwen2's rules."""
    tokens = [*SPELLING.values(), "Ġh", "ii", "Ġhii"]
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": 259, "content": "<|im_start|>", "special": True},
            {"id": 260, "content": "<|im_end|>", "special": True},
            {"id": 261, "content": "<tool>", "special": False},
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": QWEN.pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            ],
        },
        "post_processor": {"type": "ByteLevel"},
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": {token: id for id, token in enumerate(tokens)}, "merges": MERGES},
    } | changes


def folder_with(folder: Path, raw: Any, config: Any = None) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


# ------------------------------------------------------------------------------------------------------------ GGUF


@pytest.fixture(scope="module")
def smollm(demo_gguf: Path) -> Tokenizer:
    return Tokenizer.from_gguf(read_header(demo_gguf).metadata, demo_gguf)


def test_all_golden_texts_of_the_demo_model(smollm: Tokenizer, golden: Path):
    cases = json.loads((golden / "smollm2.json").read_text(encoding="utf-8"))["tokenizer_cases"]
    assert len(cases) == 135
    for case in cases:
        assert smollm.encode(case["text"], allowed_special=set()) == case["ids"], case["text"]
        assert smollm.decode(case["ids"]) == case["text"]


def test_the_demo_model_s_control_tokens(smollm: Tokenizer):
    assert (smollm.eod_id, smollm.im_start_id, smollm.im_end_id) == (0, 1, 2)
    assert (smollm.bos_id, smollm.eos_id, smollm.pad_id) == (1, 2, 2)
    assert len(smollm.special_tokens) == 17
    assert smollm.vocab_size == 49152


def test_bytes_that_the_demo_model_lacks_are_left_out(smollm: Tokenizer):
    assert smollm.encode("a\x04b") == smollm.encode("a") + smollm.encode("b")
    assert max(smollm.encode("\U00040000"), default=0) < smollm.vocab_size


def test_the_demo_vocabulary_loads_quickly(demo_gguf: Path):
    values = read_header(demo_gguf).metadata
    started = time.perf_counter()
    Tokenizer.from_gguf(values, demo_gguf)
    assert time.perf_counter() - started < 3  # 0.2 s on an idle machine


def test_digits_are_cut_before_blanks_are(smollm: Tokenizer):
    assert [smollm.token_bytes(id) for id in smollm.encode("a   1")] == [b"a", b"   ", b"1"]


def test_a_user_defined_token_is_taken_whole_even_where_nothing_is_allowed():
    tokenizer = Tokenizer.from_gguf(metadata(), "small.gguf")
    ids = tokenizer.encode(" hii<tool><|im_end|>", allowed_special=set())
    assert ids[:2] == [260, 261]
    assert 1 not in ids
    assert not tokenizer.is_special(261)
    assert tokenizer.decode(ids, skip_special_tokens=True) == " hii<tool><|im_end|>"
    assert tokenizer.encode(" hii<|im_end|>") == [260, 1]


def test_padding_rows_of_a_gguf_have_no_text():
    tokenizer = Tokenizer.from_gguf(metadata(), "small.gguf")
    assert tokenizer.vocab_size == 263
    assert tokenizer.decode([262], errors="ignore") == ""


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        (metadata(model="llama"), "'llama'"),
        (metadata(pre="tekken"), "'tekken'; known are default, gpt-2, qwen2, smollm"),
        (metadata(add_bos_token=True), "add_bos_token"),
        (metadata(tokens=None), r"no list tokenizer\.ggml\.tokens"),
        (metadata(merges=[]), r"no list tokenizer\.ggml\.merges"),
        (metadata(token_type=[1, 1]), "2 token types for 263 tokens"),
        (metadata(token_type=[3, 3] + [1] * 259 + [4, 9]), "type 9, which is not understood"),
        (metadata(merges=["Ġ h", "i x"]), r"'i x' \(number 1\) of tokens it does not hold"),
        (metadata(merges=["i i", "Ġ h"]), "out of the order"),
        (metadata(tokens=["<|im_end|>", *metadata()["tokenizer.ggml.tokens"][1:]]), r"'<\|im_end\|>' twice: 0 and 1"),
        (metadata(tokens=["", *metadata()["tokenizer.ggml.tokens"][1:]]), "without a surface: id 0"),
        (metadata(eos_token_id=263), "eos_token_id 263, expected an id below 263"),
        (metadata(token_type=[1, 3] + [1] * 259 + [4, 1]), None),
        (
            metadata(tokens=["中", *metadata()["tokenizer.ggml.tokens"][1:]], token_type=[1, 3] + [1] * 259 + [4, 5]),
            "'中'",
        ),
    ],
)
def test_what_is_not_understood_is_refused_by_name(values: dict[str, Any], complaint: str | None):
    if complaint is None:  # an ordinary token that no merge makes is only for decoding
        assert Tokenizer.from_gguf(values, "small.gguf").token_bytes(0) == b"<|im_start|>"
        return
    with pytest.raises(TokenizerError, match=complaint):
        Tokenizer.from_gguf(values, "small.gguf")


def test_a_gguf_without_a_vocabulary_says_so():
    with pytest.raises(MissingTokenizerError, match=r"small\.gguf has no tokenizer\.ggml\.model"):
        Tokenizer.from_gguf({"general.architecture": "qwen"}, "small.gguf")


@pytest.mark.parametrize(("architecture", "pieces"), [("qwen", [" ", "1", "2"]), ("llama", [" 12"])])
def test_an_unnamed_rule_is_qwen_s_for_qwen_and_gpt2_s_for_others(architecture: str, pieces: list[str]):
    values = metadata(pre=None) | {"general.architecture": architecture}
    assert Tokenizer.from_gguf(values, "old.gguf").pieces(" 12") == pieces


# -------------------------------------------------------------------------------------------------- tokenizer.json


def test_tokenizer_json_of_a_qwen2_folder(tmp_path: Path):
    config = {"eos_token": "<|im_end|>", "pad_token": {"content": "<|im_start|>"}, "bos_token": None}
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, tokenizer_json(), config))
    assert tokenizer.encode(" hii<|im_end|><tool>") == [258, 260, 261]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 260, 259)
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")
    assert tokenizer.vocab_size == 262


def test_merges_may_be_pairs(tmp_path: Path):
    raw = tokenizer_json()
    raw["model"]["merges"] = [merge.split(" ") for merge in MERGES]
    assert Tokenizer.from_folder(folder_with(tmp_path, raw)).encode(" hii") == [258]


def _changed(path: str, value: Any) -> dict[str, Any]:
    raw = copy.deepcopy(tokenizer_json())
    *parents, last = path.split(".")
    target = raw
    for name in parents:
        target = target[int(name)] if isinstance(target, list) else target[name]
    target[last] = value
    return raw


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("model.type", "Unigram", "model.type 'Unigram'; understood: 'BPE'"),
        ("model.vocab", {}, "no model with a vocab"),
        ("model", None, "no model with a vocab"),
        ("model.byte_fallback", True, "model.byte_fallback True"),
        ("model.ignore_merges", True, "model.ignore_merges True"),
        ("model.dropout", 0.1, "model.dropout 0.1"),
        ("normalizer", None, "normalizer.type None; understood: 'NFC'"),
        ("normalizer", {"type": "Lowercase"}, "normalizer.type 'Lowercase'"),
        ("decoder", {"type": "Metaspace"}, "decoder.type 'Metaspace'"),
        ("post_processor", {"type": "TemplateProcessing"}, "post_processor.type 'TemplateProcessing'"),
        ("pre_tokenizer", None, "the pre_tokenizer None"),
        ("pre_tokenizer", {"type": "Metaspace"}, "the pre_tokenizer {'type': 'Metaspace'}"),
        ("pre_tokenizer.pretokenizers.0.pattern", {"Regex": r"\d+"}, r"\\d\+"),
        ("added_tokens.0.lstrip", True, r"added_tokens '<\|im_start\|>' lstrip True"),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": []}, "which is none of qwen2, gpt-2, smollm"),
        ("pre_tokenizer", "ByteLevel", "the pre_tokenizer 'ByteLevel'"),
        ("decoder", ["ByteLevel"], r"decoder.type \"\['ByteLevel'\]\""),
        ("model.vocab", {"a": "0"}, "whose ids are not different whole numbers"),
        ("model.vocab", {"a": 0, "b": 0}, "whose ids are not different whole numbers"),
        ("model.merges", [None, 7], r"the merge 'None' \(number 0\)"),
        ("added_tokens", ["<s>"], "the added token '<s>'"),
        ("added_tokens.0.content", None, "expected a content and an id"),
    ],
)
def test_parts_of_tokenizer_json_that_are_not_understood(tmp_path: Path, path: str, value: Any, complaint: str):
    with pytest.raises(TokenizerError, match=complaint):
        Tokenizer.from_folder(folder_with(tmp_path, _changed(path, value)))


def test_a_named_token_must_exist(tmp_path: Path):
    with pytest.raises(TokenizerError, match="names '</s>' as eos_token"):
        Tokenizer.from_folder(folder_with(tmp_path, tokenizer_json(), {"eos_token": "</s>"}))


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x80"])
def test_a_damaged_tokenizer_json(tmp_path: Path, text: str):
    (tmp_path / "tokenizer.json").write_text(text, encoding="latin-1")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json (is not readable JSON|holds \[1\])"):
        Tokenizer.from_folder(tmp_path)
