"""How the engine runs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from qwenlet.config.fields import positive
from qwenlet.errors import ConfigError

LINEAR_KINDS = ("auto", "tiled", "streamed", "prepacked", "torch")
KV_CACHES = ("auto", "bf16", "fp16", "fp32", "int8")
DECODERS = ("auto", "kernels", "torch", "modules")
ATTENTION_BACKENDS = ("auto", "flash", "sdpa", "math", "efficient")

# prompt tokens of a step, alone and beside replies: a GPU reads its weights many times faster than a step's Python runs
_CHUNKS = {"cpu": (512, 128), "cuda": (2048, 512)}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the engine runs.

    Attributes:
        max_context: positions per request; None: as many as the model has published maths for.
        attention: which kernels may run: "flash", "math" or "efficient" of torch's, "sdpa" whichever torch chooses; on
            a GPU the flash-attn package goes before torch's with "auto" and "flash", and replies have our own kernels.
        ntk: "prompt" sets the NTK factor from the prompt, as published; "reserve" from prompt + max_new_tokens.
        prefill_chunk: tokens per step, so that progress can be shown and a reply can be stopped early; None: 512, or
            2048 on a GPU.
        mixed_chunk: prompt tokens per step while other replies are being written, which wait for them; None: 128, or
            512 on a GPU.
        max_requests: that run at once; more wait.
        cache_tokens: tokens whose keys and values fit into the cache, of all requests together; None: as many as the
            longest request needs.
        prefix_cache: keep what is stored of a prompt for later ones that begin alike.
        speculate: guess the next tokens of a single reply from what it repeats; the reply is the same, only sooner.
        linear: which kernels run bfloat16 linears on a CPU: "tiled" (our own, the whole forward pass in one call),
            "streamed" (our own for a few rows, torch's for many), "prepacked" (oneDNN on a copy of the weights in its
            order), "torch"; "auto" takes the first that runs here.
        kv_cache: how keys and values are stored; "auto": in int8 where weights are quantized, else in the model's
            precision.
        decode: how the tokens of replies run on a GPU: "kernels" (our own, recorded once and replayed), "torch" (the
            same step by torch's operations), "modules" (as prompts do); "auto" takes the first that runs here and
            agrees with `attention`. On a CPU "auto" is the native program, or "modules".
        tile_cache: quantized weights are kept in the kernels' order in qwenlet's cache (as large again as the weights),
            so that later loads map them.
    """

    max_context: int | None = None
    attention: str = field(default="auto", metadata={"choices": ATTENTION_BACKENDS})
    ntk: Literal["prompt", "reserve"] = "prompt"
    prefill_chunk: int | None = None
    mixed_chunk: int | None = None
    max_requests: int = 64
    cache_tokens: int | None = None
    prefix_cache: bool = True
    speculate: bool = True
    linear: str = field(default="auto", metadata={"choices": LINEAR_KINDS})
    kv_cache: str = field(default="auto", metadata={"choices": KV_CACHES})
    decode: str = field(default="auto", metadata={"choices": DECODERS})
    tile_cache: bool = True

    def __post_init__(self) -> None:
        if self.max_context is not None:
            positive("max_context", self.max_context)
        if self.cache_tokens is not None:
            positive("cache_tokens", self.cache_tokens)
        positive("max_requests", self.max_requests)
        for name in ("prefill_chunk", "mixed_chunk"):
            if getattr(self, name) is not None:
                positive(name, getattr(self, name))
        if self.cache_tokens is not None and self.max_context is not None and self.cache_tokens < self.max_context:
            raise ConfigError(
                f"cache_tokens is {self.cache_tokens}, less than one request of max_context={self.max_context} needs",
                hint="raise cache_tokens, or lower max_context",
            )
        if self.attention not in ATTENTION_BACKENDS:
            raise ConfigError(f"attention is {self.attention!r}, expected one of {', '.join(ATTENTION_BACKENDS)}")
        if self.decode not in DECODERS:
            raise ConfigError(f"decode is {self.decode!r}, expected one of {', '.join(DECODERS)}")
        if self.linear not in LINEAR_KINDS:
            raise ConfigError(f"linear is {self.linear!r}, expected one of {', '.join(LINEAR_KINDS)}")
        if self.kv_cache not in KV_CACHES:
            raise ConfigError(f"kv_cache is {self.kv_cache!r}, expected one of {', '.join(KV_CACHES)}")
        if self.ntk not in ("prompt", "reserve"):
            raise ConfigError(f"ntk is {self.ntk!r}, expected 'prompt' or 'reserve'")

    def chunks(self, device: str) -> tuple[int, int]:
        """Prompt tokens of a step, alone and beside replies, on a device of this type."""
        prompt, mixed = _CHUNKS.get(device, _CHUNKS["cpu"])
        return self.prefill_chunk or prompt, self.mixed_chunk or mixed

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> EngineConfig:
        """Refuses an option that does not exist, naming the nearest one that does."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise ConfigError(
                    f"unknown engine option {name!r}; known are {', '.join(known)}",
                    hint=f"did you mean {near[0]!r}?" if near else None,
                )
        return cls(**options)
