"""Which files of a repository make a model, and whether a folder has all of them.

Only names decide: config, tokenizer and weights are wanted; code (*.py) and everything else never is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from qwenlet.errors import HubError

_SMALL = (
    "config.json", "generation_config.json", "quantize_config.json", "adapter_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "*.tiktoken", "chat_template.*", "*.safetensors.index.json", "*.bin.index.json",
)  # fmt: skip
_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")  # training state that some repositories keep
_NUMBERED = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})(?P<suffix>\.\w+)")


def choose_files(names: Iterable[str], repo: str, file: str | None = None) -> list[str]:
    """The files to fetch out of all `names` in a repository; weights come last, so that they complete a snapshot.

    Args:
        file: one GGUF file, if the user named it.

    Raises:
        HubError: nothing we can read, or several GGUF files and none named.
    """
    names = sorted(names)
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    if file is not None:
        if file not in ggufs:
            raise HubError(f"{repo} has no file {file}; its GGUF files: {', '.join(ggufs) or 'none'}")
        return _safe([file])
    top = [name for name in names if "/" not in name]
    weights = [name for name in top if name.endswith(".safetensors")]
    unwanted_index = "*.bin.index.json"
    if not weights:
        weights = [name for name in top if name.endswith(".bin") and name not in _NOT_WEIGHTS]
        unwanted_index = "*.safetensors.index.json"
    if weights and "config.json" in top:
        small = [name for name in top if any(fnmatchcase(name, pattern) for pattern in _SMALL)]
        return _safe([*(name for name in small if not fnmatchcase(name, unwanted_index)), *weights])
    if len(ggufs) == 1:
        return _safe(ggufs)
    if ggufs:
        raise HubError(f"{repo} has {len(ggufs)} GGUF files: {', '.join(ggufs)}", hint=f"name one: {repo}:{ggufs[0]}")
    raise HubError(
        f"{repo} holds no model we can read: expected config.json with *.safetensors or *.bin, or a .gguf file; "
        f"seen: {', '.join(names[:12]) or 'nothing'}{' ...' if len(names) > 12 else ''}"
    )


def find_model(folder: Path, file: str | None = None) -> tuple[Path | None, list[str]]:
    """The model that lies in a snapshot folder (the folder, or its GGUF file), and the names of what it lacks."""
    if file is not None:
        return (folder / file, []) if (folder / file).is_file() else (None, [file])
    if not (folder / "config.json").is_file():
        ggufs = [path for path in folder.glob("**/*.gguf") if path.is_file()]
        return (ggufs[0], []) if len(ggufs) == 1 else (None, ["config.json"])
    missing = _missing_weights(folder)
    return (None, missing) if missing else (folder, [])


def _missing_weights(folder: Path) -> list[str]:
    for suffix in (".safetensors", ".bin"):
        indexes = sorted(folder.glob(f"*{suffix}.index.json"))
        if indexes:
            return [name for name in _shards(indexes[0]) if not (folder / name).is_file()]
        found = [path.name for path in folder.glob(f"*{suffix}") if path.name not in _NOT_WEIGHTS and path.is_file()]
        if found:
            return sorted(_siblings(found) - set(found))
    return ["weights (*.safetensors or *.bin)"]


def _shards(index: Path) -> list[str]:
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(str(name) for name in shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [f"a readable {index.name}"]


def _siblings(found: list[str]) -> set[str]:
    """All the names that numbered shards (model-00001-of-00002.safetensors) promise."""
    matches = [match for name in found if (match := _NUMBERED.fullmatch(name))]
    return {
        f"{match['stem']}-{number:05d}-of-{match['count']}{match['suffix']}"
        for match in matches
        for number in range(1, int(match["count"]) + 1)
    }


def _safe(names: list[str]) -> list[str]:
    """Refuses names that would leave the snapshot's folder: they come from a server."""
    for name in names:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in name:
            raise HubError(f"the repository lists a file named {name!r}, which is not a plain relative path")
    return names
