"""The model that is measured, in each precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qwenlet.config import ModelConfig, QuantConfig, qwen_1_8b
from qwenlet.errors import RequestError
from qwenlet.profiling.costs import QUANTIZED

if TYPE_CHECKING:
    from qwenlet.checkpoint import Checkpoint, Progress
    from qwenlet.llm import LLM


RANDOM = "random:"


def _tiny() -> ModelConfig:
    """Seconds on any machine; says nothing of a real model's speed."""
    return replace(
        qwen_1_8b(), vocab_size=2048, hidden_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=128, intermediate_size=512,
    )  # fmt: skip


SHAPES: dict[str, Callable[[], ModelConfig]] = {"1.8b": qwen_1_8b, "tiny": _tiny}


@dataclass(frozen=True)
class Subject:
    """How a model is found and loaded.

    Attributes:
        model: as `qwenlet.load` takes it, or "random:" and one of SHAPES: random weights, made in memory.
        device, offline, revision: as `qwenlet.load` takes them.
    """

    model: str
    device: str = "auto"
    offline: bool | None = None
    revision: str | None = None

    def checkpoint(self, progress: Progress | None = None, precision: str = "bf16") -> Checkpoint:
        """Understood, not loaded; a random one as if `precision` was stored.

        Raises QwenletError where there is none.
        """
        if self.model.startswith(RANDOM):
            return self._random(precision)
        from qwenlet import hub
        from qwenlet.checkpoint import Checkpoint

        return Checkpoint.open(hub.resolve(self.model, offline=self.offline, revision=self.revision, progress=progress))

    def facts(self, progress: Progress | None = None) -> tuple[ModelConfig, QuantConfig | None]:
        """Shapes, and how the weights are stored if they are quantized."""
        checkpoint = self.checkpoint(progress)
        return checkpoint.config, checkpoint.quant

    def _random(self, precision: str) -> Checkpoint:
        from qwenlet.checkpoint import RandomCheckpoint, dtype_by_name

        shape = self.model.removeprefix(RANDOM)
        if shape not in SHAPES:
            raise RequestError(f"there is no random model {shape!r}; known are {', '.join(SHAPES)}")
        if precision in QUANTIZED:
            return RandomCheckpoint.of(SHAPES[shape](), quant=QuantConfig.named(precision))
        return RandomCheckpoint.of(SHAPES[shape](), dtype=dtype_by_name(precision))

    def load(self, precision: str, context: int = 1, progress: Progress | None = None) -> LLM:
        """The model in one precision. Its own engine gets `context` positions: jobs bring their own.

        Raises:
            QwenletError: the device or the checkpoint has no such precision; the message says why.
        """
        from qwenlet import api

        quantized = precision in QUANTIZED
        options: dict[str, Any] = {"quant": precision} if quantized else {"quant": "none", "dtype": precision}
        random = self.model.startswith(RANDOM)
        return api.load(
            self.checkpoint(precision=precision) if random else self.model,
            tile_cache=not random,
            device=self.device,
            offline=self.offline,
            revision=self.revision,
            progress=progress,
            max_context=context,
            **options,
        )
