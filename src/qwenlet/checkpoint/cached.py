"""Quantized models kept in the kernels' order, so that rounding and repacking happen once.

The first load of a quantized model writes a file of tiles (`tilefile`) into the cache, then maps it, as all later ones
do: that takes neither time nor memory of its own, and the system's pages of a file are larger than those of a heap.
"""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from qwenlet.checkpoint.importance import rounding_of
from qwenlet.checkpoint.load import Checkpoint, LoadReport, Progress, load_model
from qwenlet.checkpoint.tilefile import SUFFIX, TileFile, TileWriter, tile_files
from qwenlet.config import QuantConfig
from qwenlet.model import Qwen

_FORMAT = 3  # raise it when the same weights would be rounded or laid out differently
# what the tiles depend on: a report or a setting of generation that comes later is none of it
_READ = ("*.safetensors", "*.bin", "*.gguf", "*.index.json", "config.json", "quantize_config.json", "*.tiktoken",
         "tokenizer.json", "tokenizer_config.json")  # fmt: skip


def load_quantized(
    checkpoint: Checkpoint,
    quant: QuantConfig | None,
    cache: Path | None,
    *,
    linear: str = "auto",
    progress: Progress | None = None,
) -> tuple[Qwen, LoadReport]:
    """`load_model` of quantized weights on a CPU, out of the cache or put there.

    Args:
        quant: rounds weights that are stored as floats (fitted to the model); None: codes as they are stored.
        cache: a folder; None: nothing is kept.
    """

    def load(kept: TileFile | None = None, keep: TileWriter | None = None) -> tuple[Qwen, LoadReport]:
        rounding = None if quant is None else rounding_of(checkpoint, quant, progress)
        return load_model(
            checkpoint, torch.float32, torch.device("cpu"), linear=linear, quantized=True, rounding=rounding,
            kept=kept, keep=keep, progress=progress,
        )  # fmt: skip

    if cache is None:
        return load()
    about = _about(checkpoint, quant)
    path = cache / f"{_plain(checkpoint.path.resolve().name)}-{_key(about)}{SUFFIX}"
    kept = TileFile.open(path)
    if kept is not None:
        model, report = load(kept)
        if report.kept:
            return model, report
        del model
    try:
        with TileWriter(path, about) as writer:
            _, made = load(keep=writer)
    except OSError as error:
        model, report = load()
        report.warnings.append(f"repacked anew at each start, as the result can't be kept in {cache}: {error}")
        return model, report
    _forget_outdated(cache, about)
    model, report = load(TileFile.open(path))
    report.seconds += made.seconds
    if report.kept:
        report.notes.append(f"{'repacked' if quant is None else 'rounded'}, and kept in {path}")
    return model, report


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)


def _about(checkpoint: Checkpoint, quant: QuantConfig | None) -> dict[str, Any]:
    """The source's files as they are now, and what is made of them."""
    path = checkpoint.path.resolve()
    files = [path] if path.is_file() else sorted({file for pattern in _READ for file in path.glob(pattern)})
    seen = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return {"format": _FORMAT, "path": str(path), "quant": None if quant is None else asdict(quant), "files": seen}


def _key(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def _forget_outdated(cache: Path, about: dict[str, Any]) -> None:
    """Removes what was made of the same source before it changed, of sources that are gone, and in older formats."""
    for file in tile_files(cache):
        old = file.about
        same = old.get("path") == about["path"] and old.get("quant") == about["quant"]
        outdated = (same and old != about) or old.get("format") != about["format"]
        if outdated or not Path(str(old.get("path"))).exists():
            with suppress(OSError):
                file.path.unlink()
