"""The published speed and memory of Qwen-1.8B-Chat, to stand beside ours of the same shapes.

Measured by its authors on one A100-SXM4-80G from one context token: tokens/s is the mean over what was generated.
"""

from __future__ import annotations

from qwenlet.config import ModelConfig, qwen_1_8b

HARDWARE = "A100-SXM4-80G"
LENGTHS = (2048, 8192)  # tokens generated
ENCODED = 2048

# flash: flash attention v2; math: flash attention switched off. precision -> tokens/s over 2,048 and over 8,192
_SPEED = {
    "flash": {"fp32": (52.96, 47.35), "bf16": (54.09, 54.04), "int8": (55.56, 55.62), "int4": (71.07, 76.45)},
    "math": {"fp32": (52.28, 44.95), "bf16": (48.17, 45.01), "int8": (52.16, 52.99), "int4": (68.37, 65.94)},
}
# precision -> GB at the peak, encoding 2,048 tokens and generating 8,192
_MEMORY = {"fp32": (8.45, 13.06), "bf16": (4.23, 6.48), "int8": (3.48, 5.34), "int4": (2.91, 4.80)}


def is_of(config: ModelConfig) -> bool:
    """Whether a model has the shapes that the figures are of, whatever its weights."""
    theirs = qwen_1_8b()
    shapes = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return all(getattr(config, name) == getattr(theirs, name) for name in shapes)


def speed(precision: str, attention: str, tokens: int) -> float | None:
    """Tokens/s of the card for as many generated tokens; of its fastest attention unless ours is "math"."""
    row = _SPEED["math" if attention == "math" else "flash"].get(precision)
    return row[LENGTHS.index(tokens)] if row is not None and tokens in LENGTHS else None


def generating_bytes(precision: str, tokens: int) -> int | None:
    """Peak of GPU memory of the card."""
    return _gigabytes(precision, 1) if tokens == LENGTHS[-1] else None


def encoding_bytes(precision: str, tokens: int) -> int | None:
    return _gigabytes(precision, 0) if tokens == ENCODED else None


def _gigabytes(precision: str, column: int) -> int | None:
    row = _MEMORY.get(precision)
    return None if row is None else round(row[column] * 1e9)
