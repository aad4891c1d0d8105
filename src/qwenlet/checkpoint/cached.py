"""Rounded checkpoints kept in a folder, so that quantizing while loading happens once."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path

from qwenlet.checkpoint.load import Checkpoint, Progress
from qwenlet.checkpoint.quantized import write_rounded
from qwenlet.config import QuantConfig
from qwenlet.errors import QwenletError

_FORMAT = 1  # raise it when the same weights would be rounded or written differently
_READ = ("*.safetensors", "*.bin", "*.json", "*.tiktoken", "*.gguf")


def rounded(
    checkpoint: Checkpoint, quant: QuantConfig, cache: Path, notes: list[str], *, progress: Progress | None = None
) -> Checkpoint | None:
    """The checkpoint rounded as `quant` (fitted to the model) says, out of `cache` or put there.

    Returns:
        None where it can't be put there: `notes` says why.
    """
    folder = cache / f"{_plain(checkpoint.path.resolve().name)}-{_key(checkpoint, quant)}"
    if not (folder / "config.json").exists():
        try:
            write_rounded(checkpoint, folder, quant, progress=progress)
        except QwenletError as error:
            if not (folder / "config.json").exists():  # else another process was quicker
                notes.append(f"rounded anew at each start, as it can't be kept: {error.message}")
                return None
        notes.append(f"rounded, and kept in {folder}")
    return Checkpoint.open(folder)


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)


def _key(checkpoint: Checkpoint, quant: QuantConfig) -> str:
    """Of the source's files as they are now, and of what is made of them."""
    path = checkpoint.path.resolve()
    files = [path] if path.is_file() else sorted({file for pattern in _READ for file in path.glob(pattern)})
    seen = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    text = json.dumps([_FORMAT, str(path), seen, asdict(quant)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
