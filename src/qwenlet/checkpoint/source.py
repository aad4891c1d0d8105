"""The weight files as files: how large they are, and a digest that tells them from all others."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path


class Source:
    """What a model was read from.

    Attributes:
        files: the weight files, by name.
        format: "gguf", "safetensors" or "bin".
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(sorted(files))
        self.format = self.files[0].suffix.removeprefix(".")
        self._digest: str | None = None
        self._reading = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.files)

    def digest(self) -> str:
        """SHA-256 in hex: of the one file, as model hubs tell it, or of the lines "digest  name" of several.

        The first call reads the files, which takes seconds. Raises OSError where they are gone.
        """
        with self._reading:
            if self._digest is None:
                each = [_sha256(file) for file in self.files]
                lines = "".join(f"{one}  {file.name}\n" for one, file in zip(each, self.files, strict=True))
                self._digest = each[0] if len(each) == 1 else hashlib.sha256(lines.encode()).hexdigest()
            return self._digest


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
