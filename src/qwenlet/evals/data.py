"""The folder of public data sets that the tasks read, and whether its files are what they were published as.

How many records each file has, and its SHA-256, is written down in data_files.json; a file that differs is refused,
because a figure from altered data is comparable to nothing. `unchecked=True` reads it all the same; the run says so.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from qwenlet.errors import EvalError

_AGAIN = "fetch the published file again"


@dataclass(frozen=True)
class Expected:
    """Attributes: records: rows, lines or entries, as the file's kind counts them. sha256: of its bytes."""

    records: int
    sha256: str


@cache
def expected() -> dict[str, Expected]:
    """What is written down of every file, by its path in the folder."""
    text = (resources.files("qwenlet.evals") / "data_files.json").read_text(encoding="utf-8")
    return {name: Expected(*entry) for name, entry in json.loads(text).items()}


@dataclass
class DataFolder:
    """Reads files of a data folder.

    Attributes:
        unchecked: files that differ from the published ones are read all the same, and named in `altered`.
        altered: names of such files that were read.
    """

    root: Path
    unchecked: bool = False
    altered: list[str] = field(default_factory=list)

    def names(self, prefix: str) -> list[str]:
        """Names of the known files under a prefix, sorted."""
        return sorted(name for name in expected() if name.startswith(prefix))

    def has(self, name: str) -> bool:
        return (self.root / name).is_file()

    def text(self, name: str) -> str:
        """A file as text, unpacked if its name ends in .gz; line breaks as they are."""
        raw = self._bytes(name)
        if name.endswith(".gz"):
            try:
                raw = gzip.decompress(raw)
            except (OSError, EOFError, zlib.error) as problem:
                raise EvalError(f"can't unpack {self.root / name}: {problem}", hint=_AGAIN) from None
        return self._decoded(name, raw)

    def rows(self, name: str, columns: Sequence[str] | None = None) -> list[dict[str, str]]:
        """Rows of a CSV file, by the names of its header, or by `columns` where it has none."""
        try:
            lines = list(csv.reader(io.StringIO(self.text(name), newline="")))
        except csv.Error as problem:
            raise EvalError(f"{self.root / name} is not valid CSV: {problem}", hint=_AGAIN) from None
        if columns is None and not lines:
            raise EvalError(f"{self.root / name} is empty, expected a header and rows", hint=_AGAIN)
        header, body = (lines[0], lines[1:]) if columns is None else (list(columns), lines)
        self._count(name, len(body))
        for number, line in enumerate(body):
            if len(line) != len(header):
                raise EvalError(
                    f"row {number + 1} of {self.root / name} has {len(line)} columns, expected {len(header)}"
                )
        return [dict(zip(header, line, strict=True)) for line in body]

    def json_lines(self, name: str) -> list[Any]:
        """One value per line."""
        text = self.text(name)
        lines = enumerate(text.split("\n"), 1)
        values = [self._json(f"line {number} of {self.root / name}", line) for number, line in lines if line.strip()]
        self._count(name, len(values))
        return values

    def json(self, name: str) -> Any:
        """The value of a JSON file."""
        return self._json(str(self.root / name), self.text(name))

    # ------------------------------------------------------------------------------------------------- checks

    def _bytes(self, name: str) -> bytes:
        path = self.root / name
        try:
            raw = path.read_bytes()
        except OSError as problem:
            known = expected().get(name)
            records = "" if known is None else f", expected with {known.records} records"
            raise EvalError(
                f"can't read {path}: {problem.strerror or problem}{records}",
                hint="--data-dir names the folder that holds the data sets, each under its own name (mmlu, gsm8k ...)",
            ) from None
        known = expected().get(name)
        digest = hashlib.sha256(raw).hexdigest()
        if known is not None and digest != known.sha256:
            if not self.unchecked:
                raise EvalError(
                    f"{path} is not the published file: its SHA-256 is {digest[:12]}..., expected "
                    f"{known.sha256[:12]}... of {known.records} records",
                    hint="fetch it again; --unchecked-data uses it as it is, and the report says so",
                )
            if name not in self.altered:
                self.altered.append(name)
        return raw

    def _count(self, name: str, records: int) -> None:
        known = expected().get(name)
        if known is not None and records != known.records and not self.unchecked:
            raise EvalError(f"{self.root / name} has {records} records, expected {known.records}", hint=_AGAIN)

    def _decoded(self, name: str, raw: bytes) -> str:
        try:
            return raw.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError as problem:
            raise EvalError(f"{self.root / name} is not valid UTF-8 at byte {problem.start}") from None

    def _json(self, where: str, text: str) -> Any:
        try:
            return json.loads(text)
        except json.JSONDecodeError as problem:
            raise EvalError(f"{where} is not valid JSON: {problem}", hint=_AGAIN) from None
