"""How the engine runs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from qwenlet.config.fields import positive
from qwenlet.errors import ConfigError

ATTENTION_BACKENDS = ("auto", "flash", "math", "efficient")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the engine runs.

    Attributes:
        max_context: positions per request; None: as many as the model has published maths for.
        attention: which of torch's scaled-dot-product kernels may run; "auto" lets torch choose.
        ntk: "prompt" sets the NTK factor from the prompt, as published; "reserve" from prompt + max_new_tokens.
        prefill_chunk: prompt tokens per step, so that progress can be shown and a reply can be stopped early.
        prepack: let oneDNN keep its own copy of bfloat16 weights in blocked order on a CPU (faster decode).
    """

    max_context: int | None = None
    attention: str = field(default="auto", metadata={"choices": ATTENTION_BACKENDS})
    ntk: Literal["prompt", "reserve"] = "prompt"
    prefill_chunk: int = 512
    prepack: bool = True

    def __post_init__(self) -> None:
        if self.max_context is not None:
            positive("max_context", self.max_context)
        positive("prefill_chunk", self.prefill_chunk)
        if self.attention not in ATTENTION_BACKENDS:
            raise ConfigError(f"attention is {self.attention!r}, expected one of {', '.join(ATTENTION_BACKENDS)}")
        if not isinstance(self.prepack, bool):
            raise ConfigError(f"prepack is {self.prepack!r}, expected True or False")
        if self.ntk not in ("prompt", "reserve"):
            raise ConfigError(f"ntk is {self.ntk!r}, expected 'prompt' or 'reserve'")

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
