"""How a model is adapted by low-rank factors: what a user asks for, and what an adapter's folder says it is.

On disk peft's `adapter_config.json` says it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwenlet.config.fields import Fields, positive
from qwenlet.errors import ConfigError

PUBLISHED_TARGETS = ("c_attn", "c_proj", "w1", "w2")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which linears get a low-rank part beside their weight: y = W x + scale * B A x. The defaults are the published.

    Attributes:
        rank: of the low-rank part: A is [rank, in], B is [out, rank].
        alpha: the part is scaled by alpha / rank.
        dropout: share of the inputs of the low-rank part that is left out at random in training.
        targets: linears that are adapted, by the last part of their names.
        modules_to_save: modules that are trained as a whole and kept beside the adapter, such as wte and lm_head.
        rslora: scale by alpha / sqrt(rank) instead, which keeps large ranks learning (arXiv:2312.03732).
        dora: learn the length of each row of the adapted weight apart (arXiv:2402.09353).
    """

    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.05
    targets: Sequence[str] = PUBLISHED_TARGETS
    modules_to_save: Sequence[str] = ()
    rslora: bool = False
    dora: bool = False
    # of some modules, by the ends of their names; what other programs wrote
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        positive("rank", self.rank)
        if not (math.isfinite(self.alpha) and self.alpha > 0.0):
            raise ConfigError(f"alpha is {self.alpha!r}, expected a number above 0")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout is {self.dropout!r}, expected a share from 0 to below 1")
        for name in ("targets", "modules_to_save"):
            names = getattr(self, name)
            if isinstance(names, str) or not all(isinstance(each, str) and each for each in names):
                raise ConfigError(f"{name} is {names!r}, expected a list of module names")
            object.__setattr__(self, name, tuple(dict.fromkeys(names)))
        if both := sorted(set(self.targets) & set(self.modules_to_save)):
            raise ConfigError(
                f"{', '.join(both)} stands in targets and in modules_to_save",
                hint="a module is adapted or trained whole",
            )

    def scale(self, name: str = "", rank: int | None = None) -> float:
        """What multiplies the low-rank part of a module."""
        rank = self.rank if rank is None else rank
        alpha = next((a for end, a in self.alpha_pattern.items() if re.fullmatch(rf"(.*\.)?({end})", name)), self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    # ---------------------------------------------------------------------------------------------- on disk

    @classmethod
    def from_peft(cls, raw: Mapping[str, Any], source: str) -> LoraConfig:
        """Reads an `adapter_config.json` (already parsed).

        Raises:
            ConfigError: another kind of adapter, or a field that changes the maths and is not understood; by name.
        """
        f = Fields(raw, source, "LoRA")
        if (kind := f.raw.pop("peft_type", None)) != "LORA":
            raise ConfigError(f"{source} describes a {kind!r} adapter, but only 'LORA' is read")
        f.require("bias", ("none", None), "biases are not trained")
        f.require("fan_in_fan_out", (False, None), "weights are [out, in]")
        f.require("lora_bias", (False, None), "B has no bias")
        targets = f.raw.pop("target_modules", None)
        config = cls(
            rank=f.take("r", int),
            alpha=f.take("lora_alpha", float),
            dropout=f.take("lora_dropout", float, 0.0),
            # a regular expression or "all-linear": the tensors say which linears they are
            targets=() if targets is None or isinstance(targets, str) else tuple(targets),
            modules_to_save=tuple(f.raw.pop("modules_to_save", None) or ()),
            rslora=f.take("use_rslora", bool, False),
            dora=f.take("use_dora", bool, False),
            alpha_pattern=dict(f.raw.pop("alpha_pattern", None) or {}),
        )
        unknown = {name: value for name, value in f.raw.items() if name not in _INERT and value not in _OFF}
        if unknown:
            raise ConfigError(
                f"{source} has fields that are not understood: {', '.join(sorted(unknown))}",
                hint="a field that changes the maths can't be ignored; if this one doesn't, remove it from the file",
            )
        return config

    def to_peft(self, base: str | None = None) -> dict[str, Any]:
        """The way back: peft's fields. base: name or path of the model that was adapted."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": list(self.targets),
            "modules_to_save": list(self.modules_to_save) or None,
            "use_rslora": self.rslora,
            "use_dora": self.dora,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "rank_pattern": {},
            "alpha_pattern": dict(self.alpha_pattern),
        }


_OFF: tuple[Any, ...] = (None, False, {}, [], "")
# Written by peft about where the adapter comes from and how it was begun and spread; the tensors say the rest.
_INERT = frozenset(
    """task_type auto_mapping base_model_name_or_path revision inference_mode init_lora_weights rank_pattern
    layers_to_transform layers_pattern exclude_modules megatron_config megatron_core qalora_group_size peft_version
    loftq_config corda_config eva_config ensure_weight_tying runtime_config lora_ga_config arrow_config""".split()
)
