"""What a run leaves: one line of JSON per sample, written as answers come in, and how such a file is taken up again.

The first line says what the run was made with. A line is written with one call and is whole or, after a kill, the last
one and cut: then it is dropped and its sample runs again. A damaged line anywhere else is an error that names it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from qwenlet.errors import EvalError
from qwenlet.evals.task import Answer, Result, Sample, Scored


@dataclass(frozen=True)
class Settings:
    """What answers depend on beside the question; runs with equal settings may be continued.

    Attributes:
        task: its name.
        model: as it was asked for.
        weights: fingerprint of the checkpoint's files.
        precision: "fp32", "bf16", "int8", "int4" or what the model was loaded with.
        quantization: how weights are stored: bits, groups, method; "none" for floats.
        kv_cache: how keys and values are stored.
        seed: of sampled replies.
        version: of qwenlet.
    """

    task: str
    model: str
    weights: str
    precision: str
    quantization: str
    kv_cache: str
    seed: int
    version: str


@dataclass(frozen=True)
class Record:
    """One line: what was asked (by its hash), what came, what it is worth."""

    id: str
    prompt_sha256: str
    target: Any
    group: str
    answer: Answer
    scored: Scored

    @classmethod
    def of(cls, result: Result) -> Record:
        sample = result.sample
        return cls(sample.id, sample.prompt_sha256, sample.target, sample.group, result.answer, result.scored)

    def result(self, sample: Sample) -> Result:
        """The result again, for the same question."""
        return Result(sample, self.answer, self.scored)

    def to_json(self, settings: Settings) -> dict[str, Any]:
        """The line, which can be read by itself: it repeats what the answer depends on."""
        answer = {key: value for key, value in asdict(self.answer).items() if value not in ((), None)}
        made_with = {key: value for key, value in asdict(settings).items() if key != "task"}
        head = {"id": self.id, "prompt_sha256": self.prompt_sha256, "target": self.target, "group": self.group}
        return head | {"answer": answer, "scored": asdict(self.scored), "with": made_with}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Record:
        answer, scored = dict(value["answer"]), dict(value["scored"])
        for name in ("logprobs", "greedy", "texts", "finish_reasons"):
            answer[name] = tuple(answer.get(name, ()))
        scored["guessed"] = tuple(scored["guessed"])
        return cls(
            value["id"], value["prompt_sha256"], value["target"], value["group"], Answer(**answer), Scored(**scored)
        )


class SampleLog:
    """The file of one task's samples at one precision.

    Attributes:
        kept: records of an earlier run of the same settings, by id.
        dropped: whether its last line was cut and had to go.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path, self.settings = path, settings
        self.kept: dict[str, Record] = {}
        self.dropped = False
        path.parent.mkdir(parents=True, exist_ok=True)
        end = self._take_up()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self._file, end)
        if not end:
            self._write({"settings": asdict(settings)})

    def _take_up(self) -> int:
        """Reads what is there; where the whole lines end."""
        if not self.path.exists():
            return 0
        header, records, end, self.dropped = _whole_lines(self.path)
        if header is None:
            return 0
        ours = asdict(self.settings)
        if differing := [name for name in ours if header.get(name) != ours[name]]:
            name = differing[0]
            raise EvalError(
                f"{self.path} was made with {name} {header.get(name)!r}, but now it is {ours[name]!r}",
                hint="choose another --out, or remove the file to start again",
            )
        self.kept = {record.id: record for record in records}
        return end

    def add(self, result: Result) -> None:
        """Appends one line."""
        self._write(Record.of(result).to_json(self.settings))

    def _write(self, value: Mapping[str, Any]) -> None:
        line = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        # a lone surrogate has no UTF-8; in JSON it has a name
        raw = (line if _is_utf8(line) else json.dumps(value, separators=(",", ":"))).encode() + b"\n"
        while raw:
            raw = raw[os.write(self._file, raw) :]

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> SampleLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_log(path: Path) -> tuple[Settings, list[Record]]:
    """Settings and records of a file, without its last line where that is cut.

    Raises:
        EvalError: the file is missing, has no whole line, or is damaged before its last line.
    """
    if not path.is_file():
        raise EvalError(f"{path} does not exist", hint="a run's folder has its samples under samples/")
    header, records, _, _ = _whole_lines(path)
    if header is None:
        raise EvalError(f"{path} holds no whole line")
    try:
        return Settings(**header), records
    except TypeError:
        raise EvalError(f"the first line of {path} does not say what the run was made with") from None


def _whole_lines(path: Path) -> tuple[dict[str, Any] | None, list[Record], int, bool]:
    """(settings or None where there is no whole line, records, bytes of whole lines, whether more was there)."""
    header: dict[str, Any] | None = None
    records: list[Record] = []
    end = size = 0
    for number, line, size in _lines(path):
        try:
            if not line.endswith(b"\n"):
                break
            value = json.loads(line)
            if number == 1:
                header = dict(value["settings"])
            else:
                records.append(Record.from_json(value))
        except (ValueError, KeyError, TypeError) as problem:
            if end + len(line) == path.stat().st_size:
                break  # the last line: a kill, or a disk that was full
            raise EvalError(
                f"line {number} of {path} is damaged: {type(problem).__name__}: {problem}",
                hint="remove that line, and its sample runs again",
            ) from None
        end = size
    return header, records, end, end != path.stat().st_size


def _lines(path: Path) -> Iterator[tuple[int, bytes, int]]:
    """(number, line with its break, where it ends)."""
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            end += len(line)
            yield number, line, end


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
