"""Text to ids and back, against the published tokenizer's own output, and what wild input must not break."""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlet.errors import DisallowedSpecialError, MissingTokenizerError, TokenizerError
from qwenlet.tokenizer import StreamDecoder, Tokenizer
from qwenlet.tokenizer_formats import QWEN_EXTRA_FILE, QWEN_FILE, write_ranks

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>", "<|extra_204|>"]
# ordinary text, with control surfaces and parts of them strewn in
WILD_TEXT = st.lists(st.one_of(st.text(max_size=20), st.sampled_from([*CONTROL, "<|", "|>", "<|im_", "\n"]))).map(
    "".join
)


@pytest.fixture(scope="module")
def qwen(qwen_vocab: Path) -> Tokenizer:
    return Tokenizer.from_file(qwen_vocab)


@pytest.fixture(scope="module")
def published(golden: Path) -> Any:
    return json.loads((golden / "tokenizer.json").read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------ as published, case by case


def test_vocabulary(qwen: Tokenizer, published: Any):
    assert qwen.vocab_size == published["n_vocab"] == 151851
    assert qwen.special_tokens == published["specials"]
    assert (qwen.eod_id, qwen.im_start_id, qwen.im_end_id) == (151643, 151644, 151645)


def test_all_golden_texts(qwen: Tokenizer, published: Any):
    assert len(published["cases"]) == 143
    for case in published["cases"]:
        text = case["text"]
        assert qwen.encode(text) == case["ids"], text
        assert qwen.encode(text, allowed_special=set()) == case["ids_no_special"], text
        assert qwen.decode(case["ids"]) == case["decoded"], text
        assert qwen.decode(case["ids"], skip_special_tokens=True) == case["decoded_skip_special"], text


def test_golden_decode_modes(qwen: Tokenizer, published: Any):
    for case in published["decode"]:
        assert qwen.decode(case["ids"], errors="replace") == case["replace"]
        assert qwen.decode(case["ids"], errors="ignore") == case["ignore"]
        assert qwen.decode(case["ids"], skip_special_tokens=True) == case["skip_special"]


def test_golden_refusals(qwen: Tokenizer, published: Any):
    for case in published["disallowed_all"]:
        with pytest.raises(ValueError, match=r"the text holds <\|.*\|> at character"):
            qwen.encode(case["text"], allowed_special=set(), disallowed_special="all")


# -------------------------------------------------------------------------------------------------- control tokens


def test_allowed_special_decides_what_text_may_become(qwen: Tokenizer):
    text = "<|im_start|>a<|im_end|>"
    assert qwen.encode(text) == [151644, 64, 151645]
    assert qwen.encode(text, allowed_special={"<|im_end|>"})[-1] == 151645
    assert 151644 not in qwen.encode(text, allowed_special={"<|im_end|>"})
    assert max(qwen.encode(text, allowed_special=set())) < 151643


def test_allowed_wins_over_disallowed(qwen: Tokenizer):
    assert qwen.encode("<|im_end|>", disallowed_special="all") == [151645]
    assert qwen.encode("<|im_end|>", {"<|im_end|>"}, ("<|im_end|>",)) == [151645]
    with pytest.raises(DisallowedSpecialError):
        qwen.encode("a<|im_start|>", {"<|im_end|>"}, "all")


def test_any_text_can_be_disallowed(qwen: Tokenizer):
    with pytest.raises(DisallowedSpecialError, match="Human: at character 3"):
        qwen.encode("hi Human: yes", disallowed_special=["Human:"])


@pytest.mark.parametrize("allowed", [{"<|im_sep|>"}, "<|im_end|>", {""}, {1}, "none", None, 7])
def test_allowed_special_names_control_tokens(qwen: Tokenizer, allowed: Any):
    with pytest.raises(TokenizerError, match="allowed_special"):
        qwen.encode("x", allowed_special=allowed)


@given(text=WILD_TEXT)
def test_no_text_becomes_a_control_id_unless_allowed(qwen: Tokenizer, text: str):
    assert not any(map(qwen.is_special, qwen.encode(text, allowed_special=set())))


# ------------------------------------------------------------------------------------------------------ round trips


@given(text=WILD_TEXT)
def test_decoding_gives_the_nfc_of_the_text_back(qwen: Tokenizer, text: str):
    expected = unicodedata.normalize("NFC", text)
    assert qwen.decode(qwen.encode(text)) == expected
    assert qwen.decode(qwen.encode(text, allowed_special=set())) == expected


def test_plain_encoding_keeps_every_character(qwen: Tokenizer):
    text = "e\u0301<|im_end|>"
    assert qwen.decode(qwen.encode_plain(text)) == text
    assert not any(map(qwen.is_special, qwen.encode_plain(text)))


@given(left=st.text(max_size=30), right=st.text(max_size=30))
def test_an_allowed_control_token_separates(qwen: Tokenizer, left: str, right: str):
    """So a prompt's ids can be put together part by part."""
    left, right = (unicodedata.normalize("NFC", part) for part in (left, right))
    assert qwen.encode(f"{left}<|im_end|>{right}") == [*qwen.encode(left), 151645, *qwen.encode(right)]


# --------------------------------------------------------------------------------------------------------- streaming


def stream(tokenizer: Tokenizer, ids: list[int], skip_special_tokens: bool) -> str:
    decoder = StreamDecoder(tokenizer, skip_special_tokens)
    return "".join(map(decoder.push, ids)) + decoder.flush()


@given(
    ids=st.lists(st.one_of(st.integers(0, 151_935), st.integers(0, 255)), max_size=50),
    skip_special_tokens=st.booleans(),
)
def test_a_stream_adds_up_to_the_whole(qwen: Tokenizer, ids: list[int], skip_special_tokens: bool):
    """Ids below 256 are single bytes, so most of these lists are far from UTF-8."""
    whole = qwen.decode(ids, skip_special_tokens=skip_special_tokens, errors="replace")
    assert stream(qwen, ids, skip_special_tokens) == whole


@given(text=st.text())
def test_a_stream_holds_back_only_unfinished_characters(qwen: Tokenizer, text: str):
    decoder, given_out, pushed = StreamDecoder(qwen), "", b""
    for id in qwen.encode(text, allowed_special=set()):
        pushed += qwen.token_bytes(id)
        given_out += decoder.push(id)
        assert given_out == pushed.decode("utf-8", "ignore")
    assert decoder.flush() == ""


def test_half_a_character_is_held_back_and_flushed_as_a_replacement(qwen: Tokenizer):
    decoder = StreamDecoder(qwen)
    assert decoder.push(51461) == " "
    assert decoder.push(117) == "根"
    assert decoder.push(51461) == " "
    assert decoder.flush() == "\ufffd"
    assert decoder.push(117) == "\ufffd"  # nothing of the first text is left over


# --------------------------------------------------------------------------------------------------------- bad input


def test_ids_of_padding_rows_decode_as_an_invalid_byte(qwen: Tokenizer):
    """A model has 151,936 rows for 151,851 tokens, and nothing keeps it from sampling one of the others."""
    assert qwen.decode([64, 151_851, 64]) == "a\ufffda"
    assert qwen.decode([64, 151_935, 64], errors="ignore") == "aa"
    with pytest.raises(TokenizerError, match="not UTF-8"):
        qwen.decode([151_935], errors="strict")
    with pytest.raises(TokenizerError, match="no token 151851; the vocabulary ends at 151850"):
        qwen.token_bytes(151_851)


@pytest.mark.parametrize(
    ("ids", "complaint"),
    [
        ([-1], "-1 is out of range"),
        ([1, 10**9], "1000000000 is out of range; ids run from 0 to 151850"),
        ([True], "True, expected a whole number"),
        ([1.0], "1.0, expected"),
        (["1"], "'1', expected"),
        ([None], "None, expected"),
        (7, "decode got 7, expected a list"),
    ],
)
def test_bad_ids_are_named(qwen: Tokenizer, ids: Any, complaint: str):
    with pytest.raises(TokenizerError, match=complaint):
        qwen.decode(ids)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("ab\ud83d", r"half a surrogate pair, U\+D83D, at character 2"),
        (b"bytes", "a bytes, expected str"),
        (None, "NoneType"),
    ],
)
def test_bad_text_is_refused(qwen: Tokenizer, text: Any, complaint: str):
    with pytest.raises(TokenizerError, match=complaint):
        qwen.encode(text)


def test_error_modes_are_checked(qwen: Tokenizer, qwen_vocab: Path):
    with pytest.raises(TokenizerError, match="errors is 'loud'"):
        qwen.decode([1], errors="loud")  # type: ignore[arg-type]
    with pytest.raises(TokenizerError, match="errors is None"):
        Tokenizer.from_file(qwen_vocab, errors=None)  # type: ignore[arg-type]


def test_the_default_error_mode_is_the_tokenizer_s(qwen_vocab: Path):
    assert Tokenizer.from_file(qwen_vocab, errors="ignore").decode([51461]) == " "


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("x" * 1_000_000, 125_000),
        (" " * 1_000_000, 7_813),
        (" " * 1_000_001 + "x", 7_814),
        (" " * 1_000_000 + "<|im_end|>", 7_814),
        ("\n" * 1_000_000, 31_250),
    ],
    ids=["letters", "blanks", "blanks before a word", "blanks before a control token", "line breaks"],
)
def test_a_million_of_one_character(qwen: Tokenizer, text: str, tokens: int):
    """tiktoken by itself panics on a million blanks."""
    started = time.perf_counter()
    ids = qwen.encode(text)
    assert time.perf_counter() - started < 20  # about 1 s on an idle machine
    assert len(ids) == tokens
    assert qwen.decode(ids) == text


# ----------------------------------------------------------------------------------------------------------- padding


def test_padding_on_either_side(qwen: Tokenizer):
    assert qwen.pad([[1, 2], [3]], side="left") == ([[1, 2], [151643, 3]], [[1, 1], [0, 1]])
    assert qwen.pad([[1, 2], [], [3]], "right", pad_id=9) == ([[1, 2], [9, 9], [3, 9]], [[1, 1], [0, 0], [1, 0]])
    assert qwen.pad([], "left") == ([], [])


def test_padding_arguments_are_checked(qwen: Tokenizer):
    with pytest.raises(TokenizerError, match="side is 'middle'"):
        qwen.pad([[1]], side="middle")  # type: ignore[arg-type]
    with pytest.raises(TokenizerError, match="'0', expected a whole number"):
        qwen.pad([[1]], side="left", pad_id="0")  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------- files, folders


def test_a_folder_is_read_with_its_extra_words_and_saved_again(qwen_vocab: Path, tmp_path: Path):
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.mkdir()
    (source / QWEN_FILE).symlink_to(qwen_vocab)
    write_ranks(source / QWEN_EXTRA_FILE, [("一只".encode(), 151851)])
    write_ranks(source / "mine.tiktoken", [("一只猫".encode(), 151852)])
    (source / "tokenizer_config.json").write_text('{"extra_vocab_file": "mine.tiktoken"}', encoding="utf-8")

    tokenizer = Tokenizer.from_folder(source)
    assert tokenizer.encode("一只猫") == [151852]
    assert tokenizer.vocab_size == 151853
    assert tokenizer.decode([151852, 151645], skip_special_tokens=True) == "一只猫"  # an extra word is no control token

    tokenizer.save(copy)
    assert sorted(path.name for path in copy.iterdir()) == [QWEN_FILE, QWEN_EXTRA_FILE]
    assert hashlib.sha256((copy / QWEN_FILE).read_bytes()).hexdigest().startswith("b2b1b8df")
    assert Tokenizer.from_folder(copy).encode("一只猫") == [151852]


def test_saving_does_not_leave_another_tokenizer_s_words_behind(qwen: Tokenizer, tmp_path: Path):
    write_ranks(tmp_path / QWEN_EXTRA_FILE, [("一只".encode(), 151851)])
    with pytest.raises(TokenizerError, match=r"qwen_extra\.tiktoken holds words that this tokenizer lacks"):
        qwen.save(tmp_path)
    assert not (tmp_path / QWEN_FILE).exists()


def test_skipped_extra_words_are_logged(qwen_vocab: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_ranks(tmp_path / "extra", [(b"the", 151851)])
    with caplog.at_level(logging.WARNING, logger="qwenlet.tokenizer"):
        assert Tokenizer.from_file(qwen_vocab, extra_vocab_file=tmp_path / "extra").vocab_size == 151851
    assert "extra token b'the' with id 151851 is skipped: the token has the id 1782 already" in caplog.text


@pytest.mark.parametrize("name", ["../mine.tiktoken", "/etc/passwd", 7, "gone.tiktoken"])
def test_an_extra_file_must_lie_in_the_folder(qwen_vocab: Path, tmp_path: Path, name: Any):
    (tmp_path / QWEN_FILE).symlink_to(qwen_vocab)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"extra_vocab_file": name}), encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"expected a file in the same folder|no vocabulary file"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["empty", "gone"])
def test_a_folder_without_a_tokenizer_says_what_was_looked_for(tmp_path: Path, name: str):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        MissingTokenizerError, match=r"neither qwen\.tiktoken nor tokenizer\.json is there\n  hint: copy"
    ):
        Tokenizer.from_folder(tmp_path / name)


def test_another_vocabulary_can_t_be_saved_as_qwen_s(tmp_path: Path):
    alphabet = [*map(chr, range(0x21, 0x7F))]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [*alphabet, "ab"],
        "tokenizer.ggml.token_type": [1] * (len(alphabet) + 1),
        "tokenizer.ggml.merges": ["a b"],
    }
    with pytest.raises(TokenizerError, match=r"small\.gguf is not Qwen-1's"):
        Tokenizer.from_gguf(metadata, "small.gguf").save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_vocabulary_loads_quickly(qwen_vocab: Path):
    started = time.perf_counter()
    Tokenizer.from_file(qwen_vocab)
    assert time.perf_counter() - started < 3  # 0.35 s on an idle machine


def test_importing_the_tokenizer_and_chat_loads_no_torch():
    code = "import sys, qwenlet.chat, qwenlet.vocabulary; sys.exit('torch' in sys.modules or 'requests' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
