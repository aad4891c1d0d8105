"""Calibration texts -> token ids.

    a file     .json: a list of records; .jsonl: a record a line; anything else: plain text
    a name     a part of the samples that come with the package
    nothing    all of those samples

A record has `conversations` (from, value: the published fine-tuning form), `messages` (role, content) or `text`.
Conversations become ChatML as published: after one fixed system message, an opening turn that is not the user's left
out, each cut to the length wanted. Left out: what the ids are for (pipeline.py).
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwenlet import chat
from qwenlet.chat import Message
from qwenlet.checkpoint import DEFAULT_SYSTEM
from qwenlet.errors import RequestError
from qwenlet.tokenizer import Tokenizer

# Fewer tokens than this say too little about a layer's inputs: GPTQ would do more harm than good.
MIN_TOKENS = 2048
_BLOCK_CHARACTERS = 8  # of plain text, for each token of a sample: enough for several samples

BUILTIN = "builtin"
# part -> whether it has a record, by its language and kind
NAMED = {
    BUILTIN: "all samples that come with the package, English and Chinese",
    "english": "its English part",
    "chinese": "its Chinese part",
    "dialogues": "its dialogues",
}

Record = str | list[Message]


@dataclass(frozen=True)
class Calibration:
    """Samples to run through the model.

    Attributes:
        samples: token ids [length] int64 each.
        source: the file or the name they came from.
    """

    samples: tuple[Tensor, ...]
    source: str

    @property
    def tokens(self) -> int:
        return sum(map(len, self.samples))

    @property
    def sha256(self) -> str:
        """Of all ids with each sample's length before it, as little-endian int32."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(torch.cat((torch.tensor([len(sample)]), sample)).numpy().astype("<i4").tobytes())
        return digest.hexdigest()


def load_calibration(
    source: str | Path | None,
    tokenizer: Tokenizer,
    *,
    samples: int = 128,
    max_length: int = 512,
    seed: int = 0,
    min_tokens: int = MIN_TOKENS,
) -> Calibration:
    """Picks samples of at most `max_length` tokens, the same ones for the same seed.

    Args:
        source: a file, one of NAMED, or None for all built-in samples.
    Raises:
        RequestError: no such file or name, a record that is not understood (which, and why), too few tokens.
        TokenizerError: a file of conversations for a vocabulary without ChatML's control tokens.
    """
    name = BUILTIN if source is None else str(source)
    if name in NAMED:
        records = list(_named(name))
        if tokenizer.im_start_id is None or tokenizer.im_end_id is None:
            records = [r if isinstance(r, str) else "\n".join(m.content for m in r[1:]) for r in records]
    else:
        records = list(_read(Path(name)))
    shuffled = random.Random(seed)
    if len(records) == 1 and isinstance(records[0], str):
        records = list(_blocks(records[0], max_length * _BLOCK_CHARACTERS))
    shuffled.shuffle(records)
    picked: list[Tensor] = []
    for record in records:
        picked += _encode(record, tokenizer, max_length)
        if len(picked) >= samples:
            break
    calibration = Calibration(tuple(picked[:samples]), name)
    if calibration.tokens < min_tokens:
        raise RequestError(
            f"the calibration text {name} gives {calibration.tokens} tokens in {len(calibration.samples)} samples, "
            f"expected at least {min_tokens}",
            hint="give a longer text, more --samples or a larger --max-length; leave --calibration out for the "
            "built-in samples",
        )
    return calibration


def _named(name: str) -> Iterator[Record]:
    text = resources.files("qwenlet.checkpoint").joinpath("samples.json").read_text(encoding="utf-8")
    for record in _records(json.loads(text), "samples.json"):
        content = record if isinstance(record, str) else record[1].content
        chinese = any("\u4e00" <= character <= "\u9fff" for character in content)
        if name == BUILTIN or (not isinstance(record, str) if name == "dialogues" else chinese == (name == "chinese")):
            yield record


def _read(path: Path) -> Iterator[Record]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RequestError(
            f"{path} is neither a file nor a named calibration set", hint=f"named sets: {', '.join(NAMED)}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"can't read {path} as UTF-8 text: {error}") from None
    if path.suffix == ".jsonl":
        values = [_json(line, f"{path}, line {i}") for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    elif path.suffix == ".json":
        values = _json(text, str(path))
        if not isinstance(values, list):
            raise RequestError(f"{path} holds a {type(values).__name__}, expected a list of records")
    else:
        yield text
        return
    yield from _records(values, str(path))


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RequestError(f"{where} is not JSON: {error}") from None


def _records(values: Sequence[Any], source: str) -> Iterator[Record]:
    for i, value in enumerate(values, 1):
        try:
            yield _record(value)
        except RequestError as error:
            raise RequestError(f"{source}, record {i}: {error.message}", hint=error.hint) from None


def _record(value: Any) -> Record:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) and isinstance(value.get("text"), str):
        return str(value["text"])
    if isinstance(value, Mapping) and isinstance(value.get("messages"), list):
        return [Message.of(message) for message in value["messages"]]
    if isinstance(value, Mapping) and isinstance(value.get("conversations"), list):
        return [Message("system", DEFAULT_SYSTEM), *_turns(value["conversations"])]
    raise RequestError("it has neither conversations nor messages nor text")


def _turns(raw: Sequence[Any]) -> list[Message]:
    """Turns of the fine-tuning form."""
    turns = []
    for turn in raw:
        if not isinstance(turn, Mapping) or turn.get("from") not in ("user", "assistant"):
            raise RequestError(f"a turn is {turn!r:.80}, expected one from 'user' or 'assistant' with a value")
        turns.append(Message(turn["from"], turn.get("value")))  # type: ignore[arg-type]
    return turns[1:] if turns and turns[0].role != "user" else turns


def _blocks(text: str, size: int) -> Iterator[str]:
    """A long text in pieces, so that a few samples don't cost encoding it whole."""
    return (text[at : at + size] for at in range(0, len(text), size))


def _encode(record: Record, tokenizer: Tokenizer, max_length: int) -> list[Tensor]:
    """A conversation's beginning, or all of a text in samples of at most `max_length`."""
    if isinstance(record, str):
        # a control token written out in a text stays text
        ids = torch.tensor(tokenizer.encode(record, allowed_special=set()), dtype=torch.long)
        return list(ids.split(max_length)) if len(ids) else []
    ids = torch.tensor(
        chat.render(tokenizer, record, add_generation_prompt=False) + tokenizer.encode("\n"), dtype=torch.long
    )
    return [ids[:max_length]]
