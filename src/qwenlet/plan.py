"""What a model needs before it is loaded: memory, bytes read for each token, operations. Arithmetic only, no torch.

    Setup      a model's shapes, how its weights and its past are stored, how much text it shall hold
    estimate   -> Plan: every share of the peak of resident memory, what a token costs
    fitting    the longest context within a memory limit
    advice     what to change where a setup does not fit, the mildest change first
    available_memory   what this machine has left

The peak is the larger of two moments: the end of loading, when the largest tensor exists twice (the mapped file and our
copy), and the run, when the past and the activations stand beside the weights. Quantized weights stand in memory
once, in the kernels' order.

On a GPU everything lies in its memory, and the peak is what a model takes there.

Left out: training, and the speed that these numbers allow, which needs a machine's bandwidth.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qwenlet.config import EMBEDDING_GROUP_SIZE, EngineConfig, ModelConfig, QuantConfig
from qwenlet.config.engine import KV_CACHES
from qwenlet.errors import ConfigError
from qwenlet.gguf_header import GGUFHeader, TensorInfo

ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
PAGE_TOKENS = 64  # of the past, as in cache.py

# Measured once on Linux x86-64 with Python 3.11 and torch 2.13's CPU build, as resident memory (a CUDA build of torch
# takes more):
RUNTIME_BYTES = 250_000_000  # the interpreter, torch, the package, and the code of the operators that run
GPU_RUNTIME_BYTES = 200_000_000  # of a GPU: libraries' workspaces and recorded steps; an allowance, not measured
QWEN_TOKEN_BYTES = 440  # each token of a vocabulary read from qwen.tiktoken
TOKEN_BYTES = 680  # each token of one read from a GGUF header or tokenizer.json, which hold it in a second form
FAULT_BYTES = 1 << 16  # of a mapped file, what Linux makes resident around the first byte that is read
SCALE_BITS = 16  # of each group of weights
_RUNNABLE_BITS = {2: 4.5, 3: 5.0, 8: 8.5}  # GGML's Q4_0, Q4_1, Q8_0
CACHE_SCALE_BYTES = 4  # float32, of each token and head, once for K and once for V


@dataclass(frozen=True)
class Bits:
    """What a weight of each kind takes, scales and zero points included."""

    layers: float
    head: float
    embedding: float

    @classmethod
    def of(cls, quant: QuantConfig | None, dtype: str, stored: str | None = None) -> Bits:
        """`quant` with group sizes that are numbers; an embedding that stays float is read in place, as `stored`."""
        plain = 8.0 * ITEM_BYTES[dtype]
        if quant is None:
            return cls(plain, plain, plain)
        plain = 8.0 * ITEM_BYTES[stored or dtype]
        assert quant.group_size is not None, "fit() chooses the group size"
        assert quant.head_group_size is not None, "fit() chooses the head's group size"
        zero_point = 0 if quant.sym else 8
        # the kernels run a head without codes in bfloat16
        head = 16.0 if quant.head_bits is None else quant.head_bits + (SCALE_BITS + zero_point) / quant.head_group_size
        return cls(
            quant.bits + (SCALE_BITS + zero_point) / quant.group_size,
            head,
            plain if quant.embedding_bits is None else quant.embedding_bits + SCALE_BITS / EMBEDDING_GROUP_SIZE,
        )


def gguf_bits(header: GGUFHeader, dtype: str) -> Bits | None:
    """Of a GGUF file whose Q4_0, Q4_1 and Q8_0 tensors run as they are, the rest in `dtype`; None if it has none."""
    kinds = {info.type_id for info in header.tensors.values()}
    if not kinds & set(_RUNNABLE_BITS):
        return None
    plain = 8.0 * ITEM_BYTES[dtype]

    def bits(tensors: Iterable[TensorInfo]) -> float:
        sizes = [(math.prod(info.shape), info.type_id) for info in tensors]
        weights = sum(size for size, _ in sizes)
        return sum(size * _RUNNABLE_BITS.get(kind, plain) for size, kind in sizes) / max(weights, 1)

    matrices = [info for info in header.tensors.values() if len(info.shape) == 2]
    embedding = [info for info in matrices if info.name == "token_embd.weight"]
    head = [info for info in matrices if info.name == "output.weight"] or embedding
    return Bits(bits(info for info in matrices if info not in embedding + head), bits(head), bits(embedding))


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is to run, and how.

    Attributes:
        model: shapes.
        dtype: of the weights that are not quantized: bf16, fp16, fp32.
        quant: how the weights are quantized; None: not, or as `codes` says.
        codes: of a file whose own codes run as they are; `quant` goes before them.
        kv_cache: as in EngineConfig.
        context: tokens of prompt and reply together that each row holds.
        batch: rows at a time.
        chunk: prompt tokens of one step.
        gguf: the weights come from a GGUF file.
        mapped: the embedding is stored in a form that is used in place, so that only its touched rows take memory.
        stored: the precision of what the files hold in floats; None: as `dtype`.
        given: codes that a checkpoint has already: more can be added, these can't be changed.
        gpu: everything lies in a GPU's memory.
    """

    model: ModelConfig
    dtype: str = "bf16"
    quant: QuantConfig | None = None
    codes: Bits | None = None
    kv_cache: str = "auto"
    context: int = 2048
    batch: int = 1
    chunk: int = EngineConfig().chunks("cpu")[0]
    gguf: bool = False
    mapped: bool = True
    stored: str | None = None
    given: QuantConfig | None = None
    gpu: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ConfigError(f"dtype is {self.dtype!r}, expected one of {', '.join(ITEM_BYTES)}")
        if self.kv_cache not in KV_CACHES:
            raise ConfigError(f"kv_cache is {self.kv_cache!r}, expected one of {', '.join(KV_CACHES)}")
        for name, value in (("context", self.context), ("batch", self.batch), ("chunk", self.chunk)):
            if value < 1:
                raise ConfigError(f"{name} is {value}, expected 1 or more")
        limit = self.model.context_length
        if self.context > limit:
            raise ConfigError(
                f"context is {self.context}, but this model has published maths for {limit} positions",
                hint=f"use a context of {limit} or less",
            )
        if self.quant is not None:
            object.__setattr__(self, "quant", self.quant.fit(self.model))

    @property
    def quantized(self) -> bool:
        return self.quant is not None or self.codes is not None

    @property
    def bits(self) -> Bits:
        if self.quant is None and self.codes is not None:
            return self.codes
        return Bits.of(self.quant, self.dtype, None if self.gpu else self.stored)

    @property
    def step(self) -> int:
        """Tokens of the largest step."""
        return max(self.batch, min(self.chunk, self.context))

    @property
    def cache_type(self) -> str:
        """What "auto" means here: int8, or one of the dtypes."""
        if self.kv_cache != "auto":
            return self.kv_cache
        return "int8" if self.quantized else self.dtype


@dataclass(frozen=True)
class Weights:
    """One kind of weights.

    Attributes:
        name: "layers", "head", "embedding".
        parameters: how many; none for an embedding that is the head's.
        bits: each takes, scales included.
        stored: bytes in all.
        loaded: bytes in memory when loading ends.
        resident: bytes in memory during the run.
        read: bytes that a decoded token reads.
    """

    name: str
    parameters: int
    bits: float
    stored: int
    loaded: int
    resident: int
    read: int


@dataclass(frozen=True)
class Plan:
    """Every share of the peak of resident memory, in bytes, and what a token costs.

    Attributes:
        weights: by kind.
        cache: keys and values of all rows at full context, in whole pages.
        activations: of the largest step, a chunk of prompt.
        runtime: Python, torch and the vocabulary.
        loading: the largest tensor a second time, in the mapped file, at the end of loading.
        decode_bytes: that the memory delivers for one decoded token of one row at full context.
        prefill_operations: multiplications and additions for one prompt token, at half of the context.
    """

    weights: tuple[Weights, ...]
    cache: int
    activations: int
    runtime: int
    loading: int
    decode_bytes: int
    prefill_operations: int

    @property
    def weight_bytes(self) -> int:
        """In memory during the run."""
        return sum(kind.resident for kind in self.weights)

    @property
    def peak(self) -> int:
        loaded = sum(kind.loaded for kind in self.weights)
        return self.runtime + max(loaded + self.loading, self.weight_bytes + self.cache + self.activations)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"weight_bytes": self.weight_bytes, "peak": self.peak}


def estimate(setup: Setup) -> Plan:
    """The arithmetic."""
    weights = _weights(setup)
    token = cache_bytes_per_token(setup.model, setup.cache_type)
    vocabulary = QWEN_TOKEN_BYTES if setup.model.model_type == "qwen" and not setup.gguf else TOKEN_BYTES
    dequantized = setup.gguf and not setup.quantized  # slice by slice
    return Plan(
        weights=weights,
        cache=setup.batch * _pages(setup.context) * PAGE_TOKENS * token,
        activations=_activations(setup),
        runtime=GPU_RUNTIME_BYTES if setup.gpu else RUNTIME_BYTES + setup.model.vocab_size * vocabulary,
        loading=_loading(setup, 0 if dequantized else next(kind.stored for kind in weights if kind.name == "head")),
        decode_bytes=sum(kind.read for kind in weights) + setup.context * token,
        prefill_operations=_prefill_operations(setup),
    )


def _loading(setup: Setup, head: int) -> int:
    """What stands beside the weights when the last of them, the head, comes. A GPU rounds it from its floats."""
    if not setup.gpu:
        return head
    return 2 * setup.model.vocab_size * setup.model.hidden_size if setup.quant is not None else 0


def cache_bytes_per_token(model: ModelConfig, cache_type: str) -> int:
    """Bytes of keys and values that a token takes in all layers: in a dtype, or in int8 with a scale a head."""
    if cache_type != "int8":
        return model.cache_bytes(ITEM_BYTES[cache_type])
    return model.cache_bytes(1) + 2 * model.num_hidden_layers * model.num_key_value_heads * CACHE_SCALE_BYTES


def _pages(tokens: int) -> int:
    return -(-tokens // PAGE_TOKENS)


# ----------------------------------------------------------------------------------------------------------- weights


def _weights(setup: Setup) -> tuple[Weights, ...]:
    model = setup.model
    bits = setup.bits
    small = 2 * model.hidden_size + (model.qkv_size if model.qkv_bias else 0)  # norms and biases of a layer
    linears = model.num_hidden_layers * sum(rows * columns for rows, columns in _linears(model))
    others = model.num_hidden_layers * small + model.hidden_size
    body = math.ceil(linears * bits.layers / 8) + others * (4 if setup.quantized else ITEM_BYTES[setup.dtype])
    table = model.vocab_size * model.hidden_size
    head, embedding, row = (
        math.ceil(size * each / 8)
        for size, each in ((table, bits.head), (table, bits.embedding), (model.hidden_size, bits.embedding))
    )
    tied = model.tie_word_embeddings and (setup.quant is None or setup.quant.head_bits is None)
    # on a GPU, and in float32 and float16, linears are torch's own, where a tied head is the embedding itself
    shared = tied and not setup.quantized and (setup.gpu or setup.dtype != "bf16")
    copied = 0 if shared else head
    # elsewhere it is a copy in its kernel's order, and making it from the table reads all of it
    if setup.gpu or not setup.mapped or (tied and not setup.quantized):
        loaded = touched = embedding
    else:
        loaded, touched = 0, 0 if _read_by_rows(setup) else _touched(embedding, setup.context * setup.batch)
    own = 0 if model.tie_word_embeddings else table
    made = 0 if setup.quantized and not setup.gpu else 1  # while loading, else mapped
    return (
        Weights("layers", linears + others, bits.layers, body, made * body, body, body),
        Weights("head", table, bits.head, head, made * copied, copied, head),
        Weights("embedding", own, bits.embedding, embedding, loaded, touched, row),
    )


def _linears(model: ModelConfig) -> tuple[tuple[int, int], ...]:
    """(outputs, inputs) of the linears of one layer."""
    hidden, query, inner = model.hidden_size, model.num_attention_heads * model.head_dim, model.intermediate_size
    return (model.qkv_size, hidden), (hidden, query), (inner, hidden), (inner, hidden), (hidden, inner)


def _read_by_rows(setup: Setup) -> bool:
    """Whether an embedding stays in its file: in codes of eight bits its rows are read, in other forms mapped."""
    return setup.quantized and setup.bits.embedding == 8 + SCALE_BITS / EMBEDDING_GROUP_SIZE


def _touched(size: int, tokens: int) -> int:
    """Bytes of a mapped table that `tokens` different rows, spread evenly, make resident: at most, as text repeats."""
    blocks = -(-size // FAULT_BYTES)
    return math.ceil(size * (1.0 - (1.0 - 1.0 / blocks) ** tokens))


# --------------------------------------------------------------------------------------------------------- the run


def _activations(setup: Setup) -> int:
    """Buffers of one step, float32 on a CPU: the residual stream and its norm, q/k/v, the feed-forward, logits."""
    model = setup.model
    width = 3 * model.hidden_size + 2 * model.qkv_size + 3 * model.intermediate_size
    # of each row that is sampled: logits in the model's dtype, in float32, and sorted or masked
    return (ITEM_BYTES[setup.dtype] if setup.gpu else 4) * setup.step * width + 4 * setup.batch * 3 * model.vocab_size


def _prefill_operations(setup: Setup) -> int:
    return token_operations(setup.model) + setup.context // 2 * key_operations(setup.model)


def token_operations(model: ModelConfig) -> int:
    """Multiplications and additions of a token in the layers' linears; the head's are `head_operations`."""
    return 2 * model.num_hidden_layers * sum(rows * columns for rows, columns in _linears(model))


def key_operations(model: ModelConfig) -> int:
    """... of a token with one key in all layers: q k^T and p v."""
    return 4 * model.num_hidden_layers * model.num_attention_heads * model.head_dim


def head_operations(model: ModelConfig) -> int:
    """... of one position's logits."""
    return 2 * model.vocab_size * model.hidden_size


# --------------------------------------------------------------------------------------------------------- what fits


def fitting(setup: Setup, memory: int) -> int | None:
    """The longest context, in whole pages or the model's own limit, whose peak is within `memory` bytes; None: none."""

    def fits(context: int) -> bool:
        return estimate(replace(setup, context=context)).peak <= memory

    limit = setup.model.context_length
    if fits(limit):
        return limit
    low, high = 0, _pages(limit)  # pages: the first fit, the second don't
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * PAGE_TOKENS) else (low, middle)
    return low * PAGE_TOKENS or None


@dataclass(frozen=True)
class Change:
    """One way to need less memory. `options` are the command line's; `peak` in bytes with them."""

    options: str
    setup: Setup
    peak: int


def advice(setup: Setup, memory: int) -> list[Change]:
    """Changes that make a setup fit, each enough by itself. Empty: it fits already, or nothing helps.

    First what keeps the context, from what costs the least quality on; then the same with the context that fits.
    """
    if estimate(setup).peak <= memory:
        return []
    whole: list[Change] = []
    shorter: list[Change] = []
    for options, changed in _candidates(setup):
        context = fitting(changed, memory)
        if context is None:
            continue
        if context >= changed.context:
            whole.append(Change(options, changed, estimate(changed).peak))
        else:
            changed = replace(changed, context=context)
            shorter.append(Change(f"{options} --context {context}".strip(), changed, estimate(changed).peak))
    return whole + shorter


def _candidates(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """(options, setup) that need less, from what costs the least quality on, and the setup itself."""
    yield "", setup
    if setup.batch > 1:
        yield "--batch 1", replace(setup, batch=1)
    if setup.cache_type != "int8":
        yield "--kv-cache int8", replace(setup, kv_cache="int8")
    cache = "" if setup.kv_cache in ("auto", "int8") else " --kv-cache int8"
    weights = estimate(setup).weight_bytes
    for name in ("int8", "int4"):
        with suppress(ConfigError):  # layers that can't be cut into groups, or have other codes already
            quant = QuantConfig.named(name)
            quant = quant if setup.given is None else setup.given.completed(quant)
            changed = replace(setup, quant=quant, kv_cache="int8", mapped=True, gguf=False)
            if estimate(changed).weight_bytes < _WORTHWHILE * weights:
                yield f"--quant {name}{cache}", changed


_WORTHWHILE = 0.9  # of the weights' memory; what saves less is not worth what it costs in quality


def available_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that can still be used, within a container's limit; None where the system doesn't tell.

    Files that the container has read count as used in its `memory.current`, but what of them was not looked at lately
    is given back where memory is wanted.
    """
    try:
        rows = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines() if ":" in line)
        available = int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit, used = (int((cgroup / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return available
    with suppress(OSError, KeyError, ValueError):
        counts = dict(line.split() for line in (cgroup / "memory.stat").read_text(encoding="ascii").splitlines())
        used -= int(counts["inactive_file"])
    return max(0, min(available, limit - used))
