"""How weights are quantized: what a user asks for, and what a checkpoint says it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qwenlet.errors import ConfigError

GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How a model is quantized. The defaults are what quant="int4" means; `QuantConfig.named("int8")` is the other.

    Attributes:
        bits: of the linears inside the layers, 4 or 8.
        group_size: input columns that share a scale: 32, 64 or 128; None: the largest of them that divides every layer.
        sym: symmetric around zero; else a zero point per group.
        desc_act: GPTQ takes columns in the order of their activations (act-order).
        static_groups: GPTQ fixes the groups' scales before it reorders, so that columns stay where they are.
        true_sequential: GPTQ calibrates each linear of a layer behind its already quantized predecessors.
        damp_percent: share of the Hessian's mean diagonal that is added to it.
        mse: search each group's scale for the least squared error instead of taking its largest weight.
        method: "rtn" (round to nearest) or "gptq": how the codes were found; the format is the same.
        head_bits, head_group_size: of the output head; head_bits None leaves it in half precision.
        embedding_bits: 8 or None.
    """

    bits: int = 4
    group_size: int | None = None
    sym: bool = True
    desc_act: bool = False
    static_groups: bool = False
    true_sequential: bool = True
    damp_percent: float = 0.01
    mse: bool = True
    method: Literal["rtn", "gptq"] = field(default="rtn", metadata={"choices": ("rtn", "gptq")})
    head_bits: int | None = 4
    head_group_size: int = 32
    embedding_bits: int | None = 8

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("bits", self.bits, (4, 8)),
            ("group_size", self.group_size, (None, *GROUP_SIZES)),
            ("head_bits", self.head_bits, (None, 4, 8)),
            ("head_group_size", self.head_group_size, GROUP_SIZES),
            ("embedding_bits", self.embedding_bits, (None, 8)),
            ("method", self.method, ("rtn", "gptq")),
        ):
            if value not in allowed or isinstance(value, bool):
                raise ConfigError(f"{name} is {value!r}, expected {' or '.join(map(str, allowed))}")
        if not 0.0 < self.damp_percent < 1.0:
            raise ConfigError(f"damp_percent is {self.damp_percent!r}, expected a share between 0 and 1")

    @classmethod
    def named(cls, name: str) -> QuantConfig:
        """ "int4" or "int8". Raises ConfigError for any other name."""
        if name == "int4":
            return cls()
        if name == "int8":
            return cls(bits=8, head_bits=8)
        raise ConfigError(f"quant is {name!r}, expected 'int4', 'int8' or a QuantConfig")
