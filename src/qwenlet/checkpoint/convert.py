"""A checkpoint in another layout, tensor by tensor: as first published, as Qwen2ForCausalLM, as GGUF.

Up to the training length a first-generation model is a Qwen2 with as many key/value heads as query heads, number for
number. What acts beyond it no other program has: `left_behind` says what that means for a target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from qwenlet.chat import CHAT_TEMPLATE
from qwenlet.checkpoint.dtypes import dtype_by_name, dtype_name
from qwenlet.checkpoint.files import WeightFile, read_parts
from qwenlet.checkpoint.load import QWEN_CHAT_DEFAULTS, Checkpoint, Progress, plan_reading
from qwenlet.checkpoint.names import Layout, Part, split
from qwenlet.checkpoint.save import (
    SHARD_BYTES,
    ShardWriter,
    new_file,
    new_folder,
    write_json,
    write_published_configs,
    write_tokenizer,
    write_tokenizer_json,
)
from qwenlet.config import DYNAMIC_ROPE, GenerationDefaults, ModelConfig, ModelType, read_json
from qwenlet.errors import CheckpointError, ConfigError, MissingTokenizerError
from qwenlet.model import Qwen
from qwenlet.tokenizer import Tokenizer, read_folder
from qwenlet.tokenizer_bytelevel import read_gguf
from qwenlet.tokenizer_export import gguf_metadata
from qwenlet.tokenizer_formats import Vocabulary

Target = Literal["qwen", "qwen2", "gguf", "own"]
TARGETS: tuple[Target, ...] = get_args(Target)


@dataclass(frozen=True)
class Change:
    """What happens to weights on their way.

    Attributes:
        weights: by our parameters' names, from what is stored to what is written, both in float32.
        vocab_size: rows of embedding and head afterwards; None: as many as before.
        untie: the head becomes a tensor of its own, which begins as the embedding.
        chat_format: of the model afterwards; None: as before.
    """

    weights: Mapping[str, Callable[[Tensor], Tensor]]
    vocab_size: int | None = None
    untie: bool = False
    chat_format: Literal["chatml"] | None = None

    def of_config(self, config: ModelConfig) -> ModelConfig:
        return replace(
            config,
            vocab_size=self.vocab_size or config.vocab_size,
            tie_word_embeddings=config.tie_word_embeddings and not self.untie,
        )

    def read(self, weights: WeightFile, name: str, parts: Sequence[Part], dtype: torch.dtype) -> Tensor:
        """A tensor of ours in `dtype`, changed."""
        if name not in self.weights:
            return read_parts(weights, parts, dtype)
        return self.weights[name](read_parts(weights, parts, torch.float32)).to(dtype)


_NO_CHANGE = Change({})


def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: str = "qwen",
    dtype: str | None = None,
    architecture: str | None = None,
    dynamic_rope: bool = False,
    placeholders: bool = False,
    change: Change = _NO_CHANGE,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Writes a checkpoint of any layout we read in another one.

    Args:
        out: the folder to write, or for GGUF the file.
        to: "qwen", as first published; "qwen2", which transformers, vLLM, SGLang and others load as Qwen2ForCausalLM;
            "gguf" for llama.cpp; "own", a folder in the layout of the model's own type.
        dtype: "bf16", "fp16", "fp32", and for GGUF "q8_0" and "q4_0". None keeps floats as they are stored; quantized
            weights become float16.
        architecture: of a GGUF file: "qwen" or "qwen2". None keeps the model's own.
        dynamic_rope: for "qwen2": asks transformers for its own dynamic NTK beyond the training length.
        placeholders: for GGUF: a source without a vocabulary gets made-up tokens, enough for measuring speed.
        change: what happens to the weights on the way.
        progress: called with (bytes done, bytes in all, tensor name).
    Raises:
        ConfigError: the target can't express this model, or an option doesn't fit it (what and why is said).
        CheckpointError: the source is incomplete, or `out` exists.
    """
    if to not in TARGETS:
        raise ConfigError(f"to is {to!r}, expected one of {', '.join(TARGETS)}")
    checkpoint = _chatting(Checkpoint.open(source), change.chat_format)
    config = change.of_config(_target_config(checkpoint.config, to, architecture))
    if dynamic_rope and not (to == "qwen2" and config.use_dynamic_ntk):
        raise ConfigError("dynamic_rope is for a first-generation model with dynamic NTK written as 'qwen2'")
    weights = checkpoint.weights()
    model, plan = plan_reading(checkpoint, weights, [])
    if change.untie:
        plan["lm_head.weight"] = plan["transformer.wte.weight"]
    stored = dtype_name(_stored_dtype(plan, weights))
    if to == "gguf":
        named = stored if dtype is None else _gguf_type(dtype)
        with torch.device("meta"):
            model = Qwen(config)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        return _write_gguf(Path(out), checkpoint, config, weights, plan, shapes, named, placeholders, change, progress)
    target = dtype_by_name(dtype or stored)
    total = config.parameter_count * target.itemsize
    with new_folder(out) as folder:
        # the small files first: what can be refused is refused before gigabytes are written
        layout: Layout = "qwen" if config.model_type == "qwen" else "qwen2"
        if layout == "qwen":
            _published_files(folder, checkpoint, config, target)
        else:
            _qwen2_files(folder, checkpoint, config, target, dynamic_rope)
        writer = ShardWriter(folder, shard_bytes)
        for name, parts in plan.items():
            whole = change.read(weights, name, parts, target)
            for theirs, tensor in split(name, whole, layout, config):
                writer.add(theirs, tensor)
            if progress is not None:
                progress(writer.total, total, name)
        writer.close()
    return Path(out)


def write_trained(
    folder: Path,
    checkpoint: Checkpoint,
    model: Qwen,
    dtype: torch.dtype,
    *,
    chat_format: Literal["chatml"] | None = None,
) -> None:
    """A trained model of floats, with the small files of the checkpoint it came from, into an empty folder.

    In the published layout if it is a first-generation model's, else in Llama's or Qwen2's.

    Args:
        chat_format: what it learned; None: the checkpoint's own.
    Raises:
        ConfigError: the layout can't express this model.
    """
    config, checkpoint = model.config, _chatting(checkpoint, chat_format)
    if config.model_type == "qwen":
        _published_files(folder, checkpoint, config, dtype)
    else:
        _qwen2_files(folder, checkpoint, config, dtype, dynamic_rope=False)
    _write_parameters(folder, model, dtype)


def _chatting(checkpoint: Checkpoint, chat_format: Literal["chatml"] | None) -> Checkpoint:
    if chat_format is None:
        return checkpoint
    return replace(checkpoint, defaults=replace(checkpoint.defaults, chat_format=chat_format))


def write_new(folder: Path, model: Qwen, vocabulary: Vocabulary, dtype: torch.dtype) -> None:
    """A base model that comes from no checkpoint, in the published layout, into an empty folder.

    Raises:
        ConfigError: the published layout can't express this model.
    """
    tokenizer = Tokenizer(vocabulary)
    ends = () if vocabulary.eos_id is None else (vocabulary.eos_id,)
    defaults = replace(QWEN_CHAT_DEFAULTS, chat_format="raw", repetition_penalty=1.0, eos_token_ids=ends)
    write_published_configs(folder, model.config, dtype, defaults)
    if tokenizer.is_qwen:
        tokenizer.save(folder)
    else:
        write_tokenizer_json(folder, vocabulary, CHAT_TEMPLATE, tokenizer_class="PreTrainedTokenizerFast")
    _write_parameters(folder, model, dtype)


def _write_parameters(folder: Path, model: Qwen, dtype: torch.dtype) -> None:
    config = model.config
    writer = ShardWriter(folder)
    for name, parameter in model.named_parameters():
        for theirs, tensor in split(name, parameter.detach().to("cpu", dtype), _layout(config), config):
            writer.add(theirs, tensor)
    writer.close()


def _layout(config: ModelConfig) -> Layout:
    return "qwen" if config.model_type == "qwen" else "qwen2"


def left_behind(config: ModelConfig, to: str) -> list[str]:
    """What a target does not do of this model's maths, one sentence each."""
    if to in ("qwen", "own") or not (config.use_dynamic_ntk or config.use_logn_attn):
        return []
    program = "llama.cpp" if to == "gguf" else "a Qwen2ForCausalLM"
    parts = [
        name for name, on in (("dynamic NTK", config.use_dynamic_ntk), ("log-n attention", config.use_logn_attn)) if on
    ]
    return [
        f"equal up to {config.seq_length:,} tokens; beyond them this model uses {' and '.join(parts)}, which "
        f"{program} does not have (the file says so, and qwenlet reads it back)"
    ]


# ------------------------------------------------------------------------------------------------------------ what


def _target_config(config: ModelConfig, to: str, architecture: str | None) -> ModelConfig:
    """The model as the target names it. Raises ConfigError where the target can't hold it."""
    if to == "gguf":
        kind = architecture or config.model_type
        if kind not in ("qwen", "qwen2") and architecture is not None:
            raise ConfigError(f"architecture is {architecture!r}, expected 'qwen' or 'qwen2'")
    else:
        if architecture is not None:
            raise ConfigError(f"architecture is for GGUF files; {to!r} has one form", hint="leave it out")
        kind = config.model_type if to == "own" else to
    if kind == config.model_type:
        return config
    if kind == "qwen":
        config.to_published()  # refuses what that layout can't say
    elif not config.qkv_bias:
        raise ConfigError(
            f"a Qwen2 has biases on queries, keys and values; this {config.model_type} model has none",
            hint="keep the model as it is: what loads Qwen2 loads Llama too; or write it with --to gguf",
        )
    named: ModelType = "qwen" if kind == "qwen" else "qwen2"
    return replace(config, model_type=named)


def _gguf_type(dtype: str) -> str:
    """Raises ConfigError for a type we don't write."""
    from qwenlet.checkpoint.gguf_out import FILE_TYPES  # gguf takes 0.16 s to import: only those who write one wait

    key = dtype.lower()
    if key in FILE_TYPES:
        return key
    try:
        return dtype_name(dtype_by_name({"f16": "fp16", "f32": "fp32"}.get(key, key)))
    except ConfigError:
        raise ConfigError(f"dtype is {dtype!r}; a GGUF file is written in one of {', '.join(FILE_TYPES)}") from None


def _stored_dtype(plan: Mapping[str, tuple[Part, ...]], weights: WeightFile) -> torch.dtype:
    """The dtype of the embedding, or float16 where it is quantized."""
    return weights.stored_dtype(plan["transformer.wte.weight"][0].name) or torch.float16


def _vocabulary(checkpoint: Checkpoint) -> Vocabulary | None:
    with suppress(MissingTokenizerError):
        if checkpoint.header is not None:
            return read_gguf(checkpoint.header.metadata, str(checkpoint.path))
        return read_folder(checkpoint.path)
    return None


# ----------------------------------------------------------------------------------------------------- small files


def _published_files(folder: Path, checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype) -> None:
    vocabulary = _vocabulary(checkpoint) if checkpoint.layout == "qwen2" else None
    defaults = checkpoint.defaults
    if vocabulary is not None and Tokenizer(vocabulary).is_qwen:
        # what stands for a chat's ends elsewhere, the published code knows by itself
        ends = tuple(id for id in defaults.eos_token_ids if id not in _chat_ends(vocabulary, defaults))
        write_published_configs(folder, config, dtype, replace(defaults, eos_token_ids=ends))
        Tokenizer(vocabulary).save(folder)
        return
    write_published_configs(folder, config, dtype, defaults)
    write_tokenizer(folder, checkpoint)
    generation = folder / "generation_config.json"
    copied = read_json(generation)  # as it was, with fields that we don't know
    if defaults.chat_format not in (None, copied.get("chat_format")):
        write_json(generation, copied | {"chat_format": defaults.chat_format})


def _qwen2_files(
    folder: Path, checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype, dynamic_rope: bool
) -> None:
    """config.json, generation_config.json and a tokenizer of the kind that every program reads."""
    raw = config.to_own_layout() | {"torch_dtype": str(dtype).removeprefix("torch.")}
    vocabulary, defaults = _vocabulary(checkpoint), checkpoint.defaults
    ends = tuple(dict.fromkeys((*_chat_ends(vocabulary, defaults), *defaults.eos_token_ids)))
    raw["eos_token_id"] = list(ends) or None
    if dynamic_rope:
        raw["rope_parameters"] = DYNAMIC_ROPE | {"rope_theta": config.rope_theta}
        del raw["rope_scaling"]
    write_json(folder / "config.json", raw)
    generation = replace(defaults, eos_token_ids=ends).to_published()
    # padding is not one of the ends here: the published file pads with the text's end
    generation["pad_token_id"] = None if vocabulary is None else vocabulary.pad_id
    # transformers warns of fields that change nothing
    inert = {"stop_words_ids": [], "min_p": 0.0, "top_k": 0 if not defaults.do_sample else None}
    generation = {key: value for key, value in generation.items() if inert.get(key, ...) != value}
    write_json(folder / "generation_config.json", generation)
    if vocabulary is None:
        return
    chatml = bool(_chat_ends(vocabulary, defaults))
    named = {"eos_token": _surface(vocabulary, ends[0])} if ends else {}
    write_tokenizer_json(
        folder,
        vocabulary,
        CHAT_TEMPLATE if chatml else "",
        tokenizer_class="PreTrainedTokenizerFast",
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
        **named,
    )


def _chat_ends(vocabulary: Vocabulary | None, defaults: GenerationDefaults) -> tuple[int, ...]:
    """Control ids that end a turn, where the model chats."""
    if vocabulary is None or defaults.chat_format != "chatml":
        return ()
    return tuple(vocabulary.special_tokens[name] for name in ("<|im_end|>",) if name in vocabulary.special_tokens)


def _surface(vocabulary: Vocabulary, id: int) -> str:
    return next(surface for surface, other in vocabulary.special_tokens.items() if other == id)


# ------------------------------------------------------------------------------------------------------------ GGUF


def _write_gguf(
    out: Path,
    checkpoint: Checkpoint,
    config: ModelConfig,
    weights: WeightFile,
    plan: Mapping[str, tuple[Part, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    placeholders: bool,
    change: Change,
    progress: Progress | None,
) -> Path:
    if out.suffix != ".gguf":
        raise CheckpointError(f"{out} is no name for a GGUF file", hint=f"write it to {out}.gguf")
    vocabulary, defaults = _vocabulary(checkpoint), checkpoint.defaults
    described, template = None, None
    if vocabulary is not None:
        if vocabulary.size > config.vocab_size:
            raise ConfigError(
                f"the vocabulary has {vocabulary.size} tokens, but the model {config.vocab_size}; GGUF wants as many "
                "names as there are rows",
                hint="take the extra words away, or give the model rows for them",
            )
        ends = _chat_ends(vocabulary, defaults)
        eos = next(iter((*defaults.eos_token_ids, *ends)), vocabulary.eos_id)
        named = {"bos": vocabulary.bos_id, "eos": eos, "padding": vocabulary.pad_id}
        described = gguf_metadata(vocabulary, config.vocab_size, named | ({"eot": ends[0]} if ends else {}))
        template = CHAT_TEMPLATE if ends else checkpoint.chat_template
    elif placeholders:
        described = {
            "model": "gpt2", "pre": "qwen2", "tokens": [f"<{id}>" for id in range(config.vocab_size)],
            "token_type": [1] * config.vocab_size, "merges": ["a b"], "add_bos_token": False,
        }  # fmt: skip
    from qwenlet.checkpoint.gguf_out import GGUFOut

    total = sum(_elements(shape) for shape in shapes.values())
    done = 0
    with new_file(out) as path:
        writer = GGUFOut(
            path, config, dtype, shapes, described, defaults, name=checkpoint.path.stem, chat_template=template
        )
        try:
            for name in shapes:
                writer.add(name, change.read(weights, name, plan[name], _read_dtype(dtype)))
                done += _elements(shapes[name])
                if progress is not None:
                    progress(done, total, name)
        finally:
            writer.close()
    return out


def _elements(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _read_dtype(dtype: str) -> torch.dtype:
    """Codes are made from float32; floats are read as they will be written."""
    return torch.float32 if dtype.startswith("q") else dtype_by_name(dtype)
