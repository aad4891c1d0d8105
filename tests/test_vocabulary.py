"""Extra words: the published script's result, word by word reasons for what is left out, and files that are wrong."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlet.errors import TokenizerError
from qwenlet.tokenizer import Tokenizer
from qwenlet.vocabulary import _Learner, _merged, learn_merges, read_word_list, write_extra_vocab

WORDS = {"我是一只猫": 20, "你是一只猫": 10, "他是一只猫": 5, "一只": 200, "一只猫": 100, "夸张的 比喻手法": 20}


@pytest.fixture(scope="module")
def qwen(qwen_vocab: Path) -> Tokenizer:
    return Tokenizer.from_file(qwen_vocab)


def test_the_published_example(qwen: Tokenizer, qwen_vocab: Path, tmp_path: Path):
    learned = learn_merges(qwen, WORDS)
    assert [(token.decode(), id) for token, id in learned.merges] == [
        ("一只猫", 151851),
        ("只猫", 151852),
        ("是一只猫", 151853),
        ("我是一只猫", 151854),
        ("你是一只猫", 151855),
        ("他是一只猫", 151856),
    ]
    assert [(item.word, item.reason) for item in learned.skipped] == [
        ("一只", "it is the token 102292 already"),
        ("夸张的 比喻手法", "text is cut inside it: 夸张的 |  比喻手法"),
    ]

    write_extra_vocab(tmp_path / "extra", learned.merges)
    extended = Tokenizer.from_file(qwen_vocab, extra_vocab_file=tmp_path / "extra")
    assert extended.vocab_size == 151857
    assert extended.encode("我是一只猫") == [151854]
    assert extended.encode("是一只猫") == [151853]
    assert extended.encode("print") == qwen.encode("print")


def test_words_that_are_tokens_already_are_reported(qwen: Tokenizer):
    learned = learn_merges(qwen, ["the", "a b", "2024"])
    assert learned.merges == []
    assert [item.reason for item in learned.skipped] == [
        "it is the token 1782 already",
        "text is cut inside it: a |  b",
        "text is cut inside it: 2 | 0 | 2 | 4",
    ]


def test_a_second_round_goes_on_after_the_first(qwen_vocab: Path, qwen: Tokenizer, tmp_path: Path):
    write_extra_vocab(tmp_path / "first", learn_merges(qwen, ["一只猫"]).merges)
    tokenizer = Tokenizer.from_file(qwen_vocab, extra_vocab_file=tmp_path / "first")
    second = learn_merges(tokenizer, ["一只猫", "只猫"])
    assert second.merges == [("只猫".encode(), 151852)]
    assert [item.reason for item in second.skipped] == ["it is the token 151851 already"]


def test_every_learnt_word_is_one_token(qwen: Tokenizer, qwen_vocab: Path, tmp_path: Path):
    """Few letters and runs of the same one, so that many merges overlap."""
    random = Random(0)
    words = Counter("".join(random.choices("aābxyzé猫只一", k=random.randint(1, 9))) for _ in range(2000))
    learned = learn_merges(qwen, words)
    write_extra_vocab(tmp_path / "extra", learned.merges)
    extended = Tokenizer.from_file(qwen_vocab, extra_vocab_file=tmp_path / "extra")
    assert extended.vocab_size == 151851 + len(learned.merges)  # none was a token before
    for word in words.keys() - {item.word for item in learned.skipped}:
        assert len(extended.encode(word)) == 1, word


@given(sequences=st.lists(st.lists(st.sampled_from([b"a", b"b", b"ab", b"c"]), min_size=1, max_size=6), max_size=8))
def test_counting_as_it_goes_equals_counting_anew(sequences: list[list[bytes]]):
    frequencies = [index % 3 + 1 for index in range(len(sequences))]
    expected, rest = [], sequences
    while True:
        counts: Counter[bytes] = Counter()
        for sequence, frequency in zip(rest, frequencies, strict=True):
            for left, right in pairwise(sequence):
                counts[left + right] += frequency
        if not counts:
            break
        expected.append(min(counts, key=lambda token: (-counts[token], len(token), token)))
        rest = [_merged(sequence, expected[-1]) for sequence in rest]
    assert _Learner([list(sequence) for sequence in sequences], frequencies).run() == expected


def test_ids_may_start_later_but_never_in_use(qwen: Tokenizer):
    assert learn_merges(qwen, ["一只猫"], start_id=152000).merges == [("一只猫".encode(), 152000)]
    with pytest.raises(TokenizerError, match="start_id is 151850, but ids below 151851 are in use"):
        learn_merges(qwen, ["一只"], start_id=151850)


@pytest.mark.parametrize("words", [{"猫": 0}, {"猫": True}, {"猫": 1.5}, {"": 1}, [3]])
def test_bad_words_are_refused(qwen: Tokenizer, words: Any):
    with pytest.raises(TokenizerError, match="expected"):
        learn_merges(qwen, words)


def test_a_word_list(tmp_path: Path):
    path = tmp_path / "words.txt"
    path.write_bytes("一只\t200\r\n\n猫\n一只\t3\nhas blank\t7".encode())
    assert read_word_list(path) == {"一只": 203, "猫": 1, "has blank": 7}


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"good\nbad\tmany", r"words:2 is 'bad\\tmany', expected 'word' or 'word<TAB>frequency'"),
        (b"bad\t0", "words:1 is"),
        (b"bad\t", "words:1 is"),
        (b"bad\t-1", "words:1 is"),
        (b"bad\t1\t2", "words:1 is"),
        (b"\t5", "words:1 is"),
        ("bad\t٣".encode(), "words:1 is"),
        (b"good\n\xff\xfe", "words:2 is not UTF-8: byte 0xff"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, data: bytes, complaint: str):
    path = tmp_path / "words"
    path.write_bytes(data)
    with pytest.raises(TokenizerError, match=complaint):
        read_word_list(path)


def test_a_word_list_that_is_not_there(tmp_path: Path):
    with pytest.raises(TokenizerError, match="can't be read: No such file"):
        read_word_list(tmp_path / "gone")
