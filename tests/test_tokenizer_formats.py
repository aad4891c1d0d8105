"""qwen.tiktoken and extra vocabularies: what is read, what is refused, and what is written."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from pathlib import Path

import pytest

from qwenlet.errors import MissingTokenizerError, TokenizerError
from qwenlet.tokenizer_formats import QWEN_SPECIAL_TOKENS, read_qwen, read_ranks, write_ranks


def line(token: bytes, rank: int) -> bytes:
    return b64encode(token) + b" %d\n" % rank


def test_control_tokens_have_the_published_ids():
    assert len(QWEN_SPECIAL_TOKENS) == 208
    assert QWEN_SPECIAL_TOKENS["<|endoftext|>"] == 151643
    assert QWEN_SPECIAL_TOKENS["<|im_end|>"] == 151645
    assert QWEN_SPECIAL_TOKENS["<|extra_204|>"] == 151850


def test_the_vocabulary_is_written_as_it_was_published(qwen_vocab: Path, tmp_path: Path):
    write_ranks(tmp_path / "copy", read_ranks(qwen_vocab).items())
    assert (
        hashlib.sha256((tmp_path / "copy").read_bytes()).hexdigest()
        == hashlib.sha256(qwen_vocab.read_bytes()).hexdigest()
    )
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_line_ends_of_windows_and_blank_lines_do_no_harm(tmp_path: Path):
    path = tmp_path / "v"
    path.write_bytes(b"IQ== 0\r\n\r\nIg== 1\r\n")
    assert read_ranks(path) == {b"!": 0, b'"': 1}


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (line(b"a", 0) + b"YmM=\n", ":2 is b'YmM=', expected 'base64 rank'"),
        (line(b"a", 0) + b"YmM= 1 2\n", ":2 is"),
        (line(b"a", 0) + b"Y*M= 1\n" + line(b"c", 1), ":2 is"),
        (line(b"a", 0) + b"YmM= one\n", ":2 is"),
        (line(b"a", 0) + line(b"b", -1), ":2 gives the rank -1"),
        (line(b"a", 0) + line(b"a", 1), ":2 repeats b'a' of line 1"),
        (line(b"a", 7) + line(b"b", 7), ":2 repeats 7 of line 1"),
        (b"\x80\x02 not a vocabulary", ":1 is"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, data: bytes, complaint: str):
    path = tmp_path / "bad.tiktoken"
    path.write_bytes(data)
    with pytest.raises(TokenizerError) as caught:
        read_ranks(path)
    assert f"{path}{complaint}" in str(caught.value)


def test_a_file_that_is_not_there_is_missing(tmp_path: Path):
    with pytest.raises(MissingTokenizerError, match=r"no vocabulary file .*qwen\.tiktoken"):
        read_qwen(tmp_path / "qwen.tiktoken")


def test_a_folder_is_no_vocabulary_file(tmp_path: Path):
    with pytest.raises(TokenizerError, match="can't be read"):
        read_ranks(tmp_path)


@pytest.mark.parametrize("keep", [0, 1000, 2_000_000])
def test_a_truncated_vocabulary_is_refused(qwen_vocab: Path, tmp_path: Path, keep: int):
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(qwen_vocab.read_bytes()[:keep])
    with pytest.raises(TokenizerError, match=r"of the 151643 tokens|expected 'base64 rank'|repeats"):
        read_qwen(path)


def test_an_extra_vocabulary_adds_words_and_skips_what_is_taken(qwen_vocab: Path, tmp_path: Path):
    extra = tmp_path / "qwen_extra.tiktoken"
    extra.write_bytes(
        line("一只猫".encode(), 151900)
        + line(b"!", 0)
        + line(b"the", 151901)
        + line(b"qwenlet", 5)
        + line(b"zzqq", 151644)
    )
    vocabulary, skipped = read_qwen(qwen_vocab, [extra])
    assert vocabulary.ranks["一只猫".encode()] == 151900
    assert vocabulary.size == 151901
    assert [(item.token, item.reason) for item in skipped] == [
        (b"the", f"the token has the id {vocabulary.ranks[b'the']} already"),
        (b"qwenlet", "the id 5 is taken"),
        (b"zzqq", "the id 151644 is taken"),
    ]


def test_a_base_vocabulary_may_not_take_a_control_id(qwen_vocab: Path, tmp_path: Path):
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(qwen_vocab.read_bytes() + line(b"qwenlet", 151645))
    with pytest.raises(TokenizerError, match=r"151645, which belongs to <\|im_end\|>"):
        read_qwen(path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "v"
    write_ranks(path, [(b"a", 0)])
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):  # noqa: PT011 - which one depends on the system
        write_ranks(tmp_path / "folder", [(b"b", 0)])
    assert read_ranks(path) == {b"a": 0}
    assert sorted(item.name for item in tmp_path.iterdir()) == ["folder", "v"]
