"""Model -> disk, tensor by tensor: folders, shards, and the small files of the published layout.

Everything is written into a folder beside the target, which takes its name when it is complete: a full disk or a
Ctrl-C leaves nothing half-written. What a kill left is removed by the next writer to the same place.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from qwenlet.checkpoint.dtypes import DTYPES, dtype_by_name
from qwenlet.checkpoint.load import QWEN_CHAT_DEFAULTS, Checkpoint, Progress
from qwenlet.checkpoint.partial import partial_path, remove_left
from qwenlet.config import GenerationDefaults, ModelConfig
from qwenlet.errors import CheckpointError, MissingTokenizerError
from qwenlet.model import Qwen
from qwenlet.tokenizer import Tokenizer
from qwenlet.tokenizer_bytelevel import read_gguf
from qwenlet.tokenizer_export import tokenizer_json
from qwenlet.tokenizer_formats import Vocabulary

SHARD_BYTES = 2_000_000_000
_COPIED = ("generation_config.json", "tokenizer_config.json", "tokenizer.json")


def refuse_existing(out: Path) -> None:
    """Raises CheckpointError if `out` is there and not an empty folder; for those who work long before they write."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(
            f"{out} exists already and is not an empty folder", hint="choose another name or remove it"
        )


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when the block ends well and disappears when it doesn't.

    Raises:
        CheckpointError: `out` exists and is not an empty folder, or could not be written.
    """
    out = Path(out).resolve()  # "." has no name to derive another from
    refuse_existing(out)
    work = partial_path(out)
    try:
        remove_left(out.parent, out.name)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        yield work
        if out.exists():
            out.rmdir()
        os.replace(work, out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{out} could not be written: {error}",
            hint="nothing was left behind; look at the free space and the permissions there, then try again",
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def new_file(out: str | Path) -> Iterator[Path]:
    """A file to fill, which becomes `out` when the block ends well and disappears when it doesn't.

    Raises:
        CheckpointError: `out` exists, or could not be written.
    """
    out = Path(out).resolve()
    if out.exists():
        raise CheckpointError(f"{out} exists already", hint="choose another name or remove it")
    work = partial_path(out)
    try:
        remove_left(out.parent, out.name)
        out.parent.mkdir(parents=True, exist_ok=True)
        yield work
        os.replace(work, out)
    except OSError as error:
        raise CheckpointError(
            f"{out} could not be written: {error}",
            hint="nothing was left behind; look at the free space and the permissions there, then try again",
        ) from error
    finally:
        work.unlink(missing_ok=True)


class ShardWriter:
    """Writes tensors as they come into `model-0000i-of-0000n.safetensors` and an index; one shard stands in memory."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.pending: dict[str, Tensor] = {}
        self.shards: list[list[str]] = []
        self.total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        size = sum(t.nbytes for t in self.pending.values())
        if self.pending and size + tensor.nbytes > self.shard_bytes:
            self._flush()
        tensor = tensor.contiguous()
        # safetensors refuses tensors that share memory, as a head and an embedding in a .bin may
        storage = tensor.untyped_storage().data_ptr()
        if any(other.untyped_storage().data_ptr() == storage for other in self.pending.values()):
            tensor = tensor.clone()
        self.pending[name] = tensor
        self.total += tensor.nbytes

    def _flush(self) -> None:
        path = self.folder / f"shard-{len(self.shards)}"
        save_file(self.pending, path, metadata={"format": "pt"})
        path.chmod(self.folder.stat().st_mode & 0o666)  # safetensors makes it private; the folder follows the umask
        self.shards.append(list(self.pending))
        self.pending = {}

    def close(self) -> None:
        """Gives the shards their published names, now that their number is known, and writes the index."""
        if self.pending:
            self._flush()
        count = len(self.shards)
        weight_map = {}
        for i, names in enumerate(self.shards):
            file = f"model-{i + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
            os.replace(self.folder / f"shard-{i}", self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        if count > 1:
            write_json(
                self.folder / "model.safetensors.index.json",
                {"metadata": {"total_size": self.total}, "weight_map": weight_map},
            )


def write_json(path: Path, value: object) -> None:
    """For people to read."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_published_configs(
    folder: Path, config: ModelConfig, dtype: torch.dtype, defaults: GenerationDefaults
) -> None:
    """config.json, generation_config.json and tokenizer_config.json. Raises ConfigError as `to_published` does."""
    precision = {name: value == dtype and name != "fp32" for name, value in DTYPES.items()}
    write_json(folder / "config.json", config.to_published() | precision)
    write_defaults(folder, config, defaults)


def write_defaults(folder: Path, config: ModelConfig, defaults: GenerationDefaults) -> None:
    """generation_config.json and tokenizer_config.json."""
    write_json(folder / "generation_config.json", defaults.to_published())
    write_json(
        folder / "tokenizer_config.json", {"model_max_length": config.seq_length, "tokenizer_class": "QWenTokenizer"}
    )


def write_tokenizer(folder: Path, checkpoint: Checkpoint, *, foreign: bool = False) -> None:
    """A folder's tokenizer files as they are, a GGUF file's vocabulary as qwen.tiktoken.

    foreign: a vocabulary that isn't Qwen's becomes a tokenizer.json; otherwise it is a TokenizerError.
    """
    if checkpoint.header is not None:
        with suppress(MissingTokenizerError):
            metadata, source = checkpoint.header.metadata, str(checkpoint.path)
            vocabulary = read_gguf(metadata, source)
            tokenizer = Tokenizer(vocabulary)
            if foreign and not tokenizer.is_qwen:
                write_tokenizer_json(folder, vocabulary, str(metadata.get("tokenizer.chat_template", "")))
            else:
                tokenizer.save(folder)
        return
    for file in checkpoint.path.iterdir():
        if file.suffix == ".tiktoken" or file.name in _COPIED:
            shutil.copyfile(file, folder / file.name)


def write_tokenizer_json(folder: Path, vocabulary: Vocabulary, chat_template: str, **settings: object) -> None:
    """tokenizer.json and tokenizer_config.json, the latter with `settings` too."""
    raw, named = tokenizer_json(vocabulary, chat_template)
    write_json(folder / "tokenizer.json", raw)
    write_json(folder / "tokenizer_config.json", named | settings)


def write_random(
    out: str | Path,
    config: ModelConfig,
    *,
    dtype: str = "bf16",
    seed: int = 0,
    tokenizer_file: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """A checkpoint of random weights in the published layout, for measuring speed and memory.

    Initialised as published (N(0, 0.02), residual projections scaled down); the same seed gives the same bytes.

    Raises:
        ConfigError: the published layout can't express this model.
        CheckpointError: `out` exists or could not be written.
        TokenizerError: `tokenizer_file` is missing or not Qwen's vocabulary.
    """
    target = dtype_by_name(dtype)
    if tokenizer_file is not None:
        Tokenizer.from_file(tokenizer_file)  # refuses what is not a vocabulary
    generator = torch.Generator().manual_seed(seed)
    total = config.parameter_count * target.itemsize
    with torch.device("meta"):
        skeleton = Qwen(config)
    with new_folder(out) as folder:
        write_published_configs(folder, config, target, QWEN_CHAT_DEFAULTS)
        if tokenizer_file is not None:
            shutil.copyfile(tokenizer_file, folder / "qwen.tiktoken")
        writer = ShardWriter(folder)
        for name, parameter in skeleton.named_parameters():
            std = skeleton.initial_std(name)
            if std is None:
                tensor = torch.zeros(parameter.shape, dtype=target)
            elif std == 0.0:
                tensor = torch.ones(parameter.shape, dtype=target)
            else:
                tensor = torch.empty(parameter.shape, dtype=target).normal_(std=std, generator=generator)
            writer.add(name, tensor)
            if progress is not None:
                progress(writer.total, total, name)
        writer.close()
    return Path(out)
