"""qwenlet: the maintained home of first-generation Qwen. `import qwenlet` loads no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> module that defines it; resolved on first use
_LAZY = {
    "LLM": "qwenlet.llm",
    "load": "qwenlet.api",
    "Chunk": "qwenlet.engine",
    "Completion": "qwenlet.engine",
    "Score": "qwenlet.llm",
    "Tokenizer": "qwenlet.tokenizer",
    "EngineConfig": "qwenlet.config",
    "ModelConfig": "qwenlet.config",
    "QuantConfig": "qwenlet.config",
    "SamplingParams": "qwenlet.config",
    "QwenletError": "qwenlet.errors",
}

# written out, as type checkers read it
__all__ = [
    "LLM",
    "Chunk",
    "Completion",
    "EngineConfig",
    "ModelConfig",
    "QuantConfig",
    "QwenletError",
    "SamplingParams",
    "Score",
    "Tokenizer",
    "__version__",
    "load",
]

if TYPE_CHECKING:
    from qwenlet.api import load
    from qwenlet.config import EngineConfig, ModelConfig, QuantConfig, SamplingParams
    from qwenlet.engine import Chunk, Completion
    from qwenlet.errors import QwenletError
    from qwenlet.llm import LLM, Score
    from qwenlet.tokenizer import Tokenizer


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'qwenlet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
