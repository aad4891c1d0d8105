"""Files of preferences -> pairs of samples: a prompt, the reply that was chosen and the one that was rejected.

    conversations + chosen, rejected   ShareGPT's form: a turn or a text each
    messages or prompt + chosen, rejected   texts, or lists of messages: replies, or whole conversations that begin with
                                       the prompt (as UltraFeedback's do)
    chosen, rejected alone             two whole conversations that begin alike, as lists of messages, or as the text
                                       "\\n\\nHuman: ... \\n\\nAssistant: ..."
    instruction + output: [best, ..., worst]   Alpaca's form of rankings: the first against the last

Each pair is read as two records of records.py, so what is understood and refused there is here. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qwenlet.config import DataConfig
from qwenlet.errors import DataError, RequestError
from qwenlet.tokenizer import Tokenizer
from qwenlet.train.records import Bad, Dialogue, Record, Text, read_record, read_values
from qwenlet.train.samples import Report, Samples, encode

_SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):[ ]?")
_PAIR = ("chosen", "rejected")


@dataclass(frozen=True)
class Pairs:
    """Preferences.

    Attributes:
        each: the replies with their prompts: of pair i the chosen at 2i, the rejected at 2i + 1.
    """

    each: Samples

    def __len__(self) -> int:
        return len(self.each) // 2

    @property
    def both(self) -> Samples:
        """The two of a pair as one, for laying out batches: pairs are never torn."""
        one = self.each
        return Samples(one.ids, one.learned, one.starts[::2], one.where[::2], one.report)

    def select(self, indices: Sequence[int]) -> Pairs:
        return Pairs(self.each.select([at for index in indices for at in (2 * index, 2 * index + 1)]))

    def split(self, held_out: float, seed: int) -> tuple[Pairs, Pairs]:
        """(to train on, held out): a share below 1, or a number of pairs. Raises DataError if none would be left."""
        count = max(round(held_out * len(self)) if held_out < 1 else int(held_out), 1)
        if count >= len(self):
            raise DataError(f"{count} of {len(self)} pairs would be held out, so that none is left to train on")
        order = np.random.Generator(np.random.Philox(seed)).permutation(len(self))
        return self.select(sorted(order[count:])), self.select(sorted(order[:count]))


def load_pairs(paths: Sequence[str | Path], tokenizer: Tokenizer, config: DataConfig, *, system: str | None) -> Pairs:
    """The pairs of some files.

    Args:
        config: `labels` doesn't matter: what is compared is the last reply.
        system: the system message of dialogues without one; None: they get none.
    Raises:
        DataError: a file that can't be read, a record that is no pair (file and line), or no pair is left.
    """
    found: list[tuple[Record, Record]] = []
    bad = Bad()
    for path in map(Path, paths):
        for line, value in read_values(path):
            where = f"{path}:{line}"
            try:
                found.append(read_pair(value, where))
            except RequestError as error:
                bad.found.append((where, error.message))
    if bad.found and config.bad == "error":
        raise bad.error()
    report = Report(forms={"pairs": len(found)} if found else {}, bad=bad.found)
    parts: list[Samples] = []
    lost = 0
    for pair in found:
        try:
            made = encode(pair, tokenizer, replace(config, labels="last"), system=system)
        except DataError:
            if config.long == "error":
                raise
            lost += 1
            continue
        report.cut += made.report.cut
        report.openings += made.report.openings // 2  # both replies stand behind them
        if len(made) == 2:
            parts.append(made)
        else:
            lost += 1
    if config.long == "cut":  # they lost their replies
        report.nothing = lost
    else:
        report.long = lost
    if not parts:
        raise DataError(
            f"no pair is left to train on: {lost} are longer than {config.max_length} tokens",
            hint="raise --max-length",
        )
    each = _joined(parts)
    report.samples, report.tokens, report.learned = len(parts), len(each.ids), int(each.learned.sum())
    return Pairs(replace(each, report=report))


def _joined(parts: Sequence[Samples]) -> Samples:
    lengths = np.concatenate([part.lengths for part in parts])
    where = tuple(place for part in parts for place in part.where)
    ids, learned = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "learned"))
    return Samples(ids, learned, np.concatenate([[0], np.cumsum(lengths)]), where, parts[0].report)


def read_pair(value: Any, where: str) -> tuple[Record, Record]:
    """(chosen, rejected) of one parsed record. Raises RequestError that says what is wrong with it."""
    if not isinstance(value, Mapping):
        raise RequestError(f"a pair is {value!r:.60}, expected an object with chosen and rejected")
    chosen, rejected = (_whole(read_record(raw, where)) for raw in _two(value))
    if chosen == rejected:
        raise RequestError("chosen and rejected are the same")
    if _prompt_of(chosen) != _prompt_of(rejected):
        raise RequestError(
            "chosen and rejected answer different prompts; expected the same messages before the last reply"
        )
    return chosen, rejected


def _whole(record: Record) -> Record:
    """A reply is compared as one, behind the prompt where it begins."""
    return replace(record, parts=()) if isinstance(record, Dialogue) else record


def _prompt_of(record: Record) -> object:
    """What stands before the reply that is compared."""
    if isinstance(record, Text):
        return record.prompt
    asked = max((index for index, message in enumerate(record.messages) if message.role == "user"), default=-1)
    return record.messages[: asked + 1]


def _two(value: Mapping[str, Any]) -> tuple[Any, Any]:
    """The two records that a pair stands for."""
    if "instruction" in value and isinstance(value.get("output"), list) and not value.keys() & set(_PAIR):
        ranked = value["output"]
        if len(ranked) < 2:
            raise RequestError("output is a list of one, expected the best reply first and the worst last")
        return {**value, "output": ranked[0]}, {**value, "output": ranked[-1]}
    if missing := [name for name in _PAIR if name not in value]:
        raise RequestError(f"it has no {' and no '.join(map(repr, missing))}, which a pair needs")
    rest = {name: part for name, part in value.items() if name not in _PAIR}
    first, second = (_record(rest, value[name], name) for name in _PAIR)
    return first, second


def _record(rest: Mapping[str, Any], reply: Any, name: str) -> Any:
    """One side of a pair as a record."""
    if "conversations" in rest:
        turn = {"from": "assistant", "value": reply} if isinstance(reply, str) else reply
        if not isinstance(turn, Mapping):
            raise RequestError(f"{name} is {reply!r:.60}, expected a turn or a text")
        return {**rest, "conversations": [*_listed(rest, "conversations"), turn]}
    for key in ("messages", "prompt"):
        if isinstance(rest.get(key), list) or (key == "messages" and key in rest):
            others = {other: part for other, part in rest.items() if other != key}
            return {**others, "messages": _behind(_listed(rest, key), _messages(reply, name), key, name)}
    if "instruction" in rest:
        return {**rest, "output": reply}
    if "prompt" in rest:
        if isinstance(reply, list):
            asked = {"role": "user", "content": rest["prompt"]}
            others = {other: part for other, part in rest.items() if other != "prompt"}
            return {**others, "messages": _behind([asked], _messages(reply, name), "prompt", name)}
        return {**rest, "completion": reply}
    if isinstance(reply, str):
        return {**rest, "messages": _spoken(reply, name)}
    return {**rest, "messages": _messages(reply, name)}


def _listed(rest: Mapping[str, Any], key: str) -> list[Any]:
    if not isinstance(rest[key], list):
        raise RequestError(f"{key} is {rest[key]!r:.60}, expected a list")
    return rest[key]


def _messages(reply: Any, name: str) -> list[Any]:
    if isinstance(reply, str):
        return [{"role": "assistant", "content": reply}]
    messages = reply if isinstance(reply, list) else [reply]
    if not messages or not all(isinstance(message, Mapping) for message in messages):
        raise RequestError(f"{name} is {reply!r:.60}, expected a text, a message or a list of messages")
    return messages


def _behind(prompt: list[Any], reply: list[Any], key: str, name: str) -> list[Any]:
    """The prompt and the reply to it; a reply that is the whole conversation begins with the prompt, or is refused."""
    told, whole = [_said(message) for message in prompt], [_said(message) for message in reply]
    bare = whole[1:] if whole[0][0] == "system" else whole  # a system message of its own may lead it
    if told in (whole[: len(told)], bare[: len(told)]):
        return reply
    if whole[0][0] == "system" or (whole[0][0] == told[-1][0] == "user"):
        raise RequestError(f"{name} begins with other messages than {key}; expected a reply, or {key} and a reply")
    return [*prompt, *reply]


def _said(message: Any) -> tuple[Any, Any]:
    return (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, message)


def _spoken(text: str, name: str) -> list[dict[str, str]]:
    """ "\\n\\nHuman: ... \\n\\nAssistant: ..." as messages."""
    parts = _SPEAKER.split(text)
    if len(parts) < 3 or parts[0].strip():
        raise RequestError(
            f"{name} is a text without a prompt beside it, and does not begin with Human: as a whole dialogue would"
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2], strict=True)]
