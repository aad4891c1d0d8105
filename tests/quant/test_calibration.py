"""Calibration texts: every form becomes the ids it should, and what is too little or not understood is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qwenlet.errors import RequestError
from qwenlet.quant.calibration import MIN_TOKENS, NAMED, Calibration, load_calibration
from qwenlet.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(qwen_vocab: Path) -> Tokenizer:
    return Tokenizer.from_file(qwen_vocab)


CONVERSATION = {
    "id": "identity_0",
    "conversations": [{"from": "user", "value": "你好"}, {"from": "assistant", "value": "Hello <|im_end|>!"}],
}


def write(path: Path, value: object) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def only(path: Path, tokenizer: Tokenizer, **options: int) -> torch.Tensor:
    (sample,) = load_calibration(path, tokenizer, min_tokens=1, **options).samples
    return sample


def test_a_conversation_becomes_chatml_as_published(tmp_path, tokenizer) -> None:
    """Control tokens are put in by code; one that is written out in a message stays text."""
    ids = only(write(tmp_path / "a.json", [CONVERSATION]), tokenizer).tolist()
    start, end = tokenizer.im_start_id, tokenizer.im_end_id
    plain = lambda text: tokenizer.encode(text, allowed_special=set())  # noqa: E731
    expected = [
        *[start, *plain("system"), *plain("\n"), *plain("You are a helpful assistant."), end, *plain("\n")],
        *[start, *plain("user"), *plain("\n"), *plain("你好"), end, *plain("\n")],
        *[start, *plain("assistant"), *plain("\n"), *plain("Hello <|im_end|>!"), end, *plain("\n")],
    ]
    assert ids == expected
    assert ids.count(end) == 3


def test_an_opening_turn_that_is_not_the_users_is_left_out(tmp_path, tokenizer) -> None:
    opened = {"conversations": [{"from": "assistant", "value": "Welcome."}, *CONVERSATION["conversations"]]}
    with_it = only(write(tmp_path / "a.json", [opened]), tokenizer)
    without = only(write(tmp_path / "b.json", [CONVERSATION]), tokenizer)
    assert torch.equal(with_it, without)


def test_json_lines_messages_and_texts(tmp_path, tokenizer) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    lines = [json.dumps(CONVERSATION), "", json.dumps({"messages": messages}), json.dumps({"text": "<|endoftext|> x"})]
    calibration = load_calibration(write(tmp_path / "a.jsonl", "\n".join(lines)), tokenizer, min_tokens=1)
    assert len(calibration.samples) == 3
    assert tokenizer.eod_id not in torch.cat(calibration.samples).tolist()


def test_long_conversations_are_cut_and_long_texts_are_split(tmp_path, tokenizer) -> None:
    assert len(only(write(tmp_path / "a.json", [CONVERSATION]), tokenizer, max_length=7)) == 7
    text = " ".join(f"word{i}" for i in range(4000))
    calibration = load_calibration(write(tmp_path / "a.txt", text), tokenizer, samples=9, max_length=100, min_tokens=1)
    assert len(calibration.samples) == 9
    assert sorted(map(len, calibration.samples))[3:] == [100] * 6  # the others ended a piece of the text


def test_the_seed_picks_the_samples(tmp_path, tokenizer) -> None:
    path = write(tmp_path / "a.txt", " ".join(f"word{i}" for i in range(9000)))
    first, again, other = (load_calibration(path, tokenizer, samples=4, seed=seed) for seed in (0, 0, 1))
    assert first.sha256 == again.sha256 != other.sha256


def test_the_hash_sees_every_id_and_every_border() -> None:
    one = Calibration((torch.tensor([1, 2]), torch.tensor([3])), "x")
    other = Calibration((torch.tensor([1]), torch.tensor([2, 3])), "x")
    assert one.tokens == other.tokens == 3
    assert one.sha256 != other.sha256


@pytest.mark.parametrize("name", NAMED)
def test_every_named_set_is_enough(name: str, tokenizer) -> None:
    calibration = load_calibration(name, tokenizer)
    assert calibration.source == name
    assert calibration.tokens >= MIN_TOKENS


def test_the_built_in_samples_serve_a_vocabulary_without_chatml(tokenizer) -> None:
    class Plain:
        im_start_id = im_end_id = None

        def encode(self, text: str, **options: object) -> list[int]:
            return tokenizer.encode(text, **options)

    samples = load_calibration(None, Plain()).samples
    assert tokenizer.im_start_id not in torch.cat(samples).tolist()
    assert len(samples) == len(load_calibration(None, tokenizer).samples)


@pytest.mark.parametrize("text", ["", "a few words"])
def test_too_little_text_says_how_much_there_was(text: str, tmp_path, tokenizer) -> None:
    found = len(tokenizer.encode(text))
    with pytest.raises(RequestError, match=f"gives {found} tokens .* expected at least {MIN_TOKENS}"):
        load_calibration(write(tmp_path / "a.txt", text), tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.json", "{", "is not JSON"),
        ("a.json", '{"conversations": []}', "holds a dict, expected a list"),
        ("a.jsonl", '{"text": "x"}\n{', "line 2 is not JSON"),
        ("a.json", '[{"text": "x"}, {"prompt": "x"}]', "record 2: it has neither conversations nor messages nor text"),
        ("a.json", '[{"conversations": [{"from": "system", "value": "x"}]}]', "record 1: a turn is"),
        ("a.json", '[{"conversations": [{"from": "user"}]}]', "record 1: a user message has the content None"),
        ("a.json", '[{"messages": [{"role": "user"}]}]', "record 1: a message has no content"),
        ("a.json", "[[]]", "record 1: it has neither"),
    ],
)
def test_what_is_not_understood_is_named(name: str, content: str, complaint: str, tmp_path, tokenizer) -> None:
    with pytest.raises(RequestError, match=complaint):
        load_calibration(write(tmp_path / name, content), tokenizer)


def test_a_missing_file_lists_the_names(tmp_path, tokenizer) -> None:
    with pytest.raises(RequestError, match="neither a file nor a named calibration set") as caught:
        load_calibration("nonsense", tokenizer)
    assert "builtin" in str(caught.value.hint)
    with pytest.raises(RequestError, match="can't read"):
        load_calibration(tmp_path, tokenizer)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9" * 1000)
    with pytest.raises(RequestError, match="UTF-8"):
        load_calibration(tmp_path / "latin.txt", tokenizer)
