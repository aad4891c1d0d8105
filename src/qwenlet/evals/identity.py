"""Which model a run was made with, so that another one is not taken for it."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

from qwenlet.linear import QuantLinear
from qwenlet.llm import LLM

_EDGE = 1 << 16  # bytes at both ends of a file that are looked at: headers and last tensors
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt")
_BESIDE = ("config.json", "generation_config.json", "qwen.tiktoken", "tokenizer.json")


def fingerprint(path: Path) -> str:
    """SHA-256 of sizes and edges of a checkpoint's files: not a proof, but no two checkpoints share it by accident."""
    files = [path] if path.is_file() else [f for f in path.iterdir() if f.suffix in _WEIGHTS or f.name in _BESIDE]
    digest = hashlib.sha256()
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(_EDGE))
            opened.seek(max(size - _EDGE, 0))
            digest.update(opened.read(_EDGE))
    return digest.hexdigest()


def quantization(llm: LLM) -> str:
    """How many linears are stored in which bits and groups: "210 x int4/32, 1 x int8/64"; "none" for floats."""
    kinds = Counter(
        f"int{module.tiles.bits}/{module.tiles.group_size}"
        for module in llm.model.modules()
        if isinstance(module, QuantLinear)
    )
    return ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items())) or "none"
