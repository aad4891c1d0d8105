"""What a run will take, before it starts: memory by its parts, and time from the operations it has to do. No torch.

Memory is resident bytes of one process in one device's memory. An embedding that doesn't learn is a mapped file on a
CPU, of which only the rows that occur count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwenlet.config import ModelConfig
from qwenlet.plan import ITEM_BYTES, RUNTIME_BYTES, TOKEN_BYTES

Mode = Literal["none", "products", "full"]
MODES: tuple[Mode, ...] = ("none", "products", "full")
_HEAD_BYTES = 200_000_000  # of a few rows of logits and their gradient
_KEPT_BYTES = 350_000_000  # what the allocator and the library of products keep of what was let go, as measured
_MOMENTS = {"adamw": 8, "adamw8bit": 2}


@dataclass(frozen=True)
class Forecast:
    """Bytes of one process, and operations of a token.

    Attributes:
        frozen: weights that stay; learning: those that learn, their gradients and the optimizer's moments.
        activations: of one batch, by what is computed again.
        runtime: Python, torch, the vocabulary, and what they keep of memory that was let go.
        operations: multiplications and additions of a token, forward and backward, by what is computed again.
    """

    frozen: int
    learning: int
    activations: dict[str, int]
    runtime: int
    operations: dict[str, float]

    def peak(self, recompute: str) -> int:
        return self.frozen + self.learning + self.activations[recompute] + self.runtime

    def fitting(self, memory: int | None) -> Mode:
        """The way to compute again the least within `memory`; all, where nothing fits or no limit is known to hold."""
        if memory is None:
            return "full"
        return next((mode for mode in MODES if self.peak(mode) < 0.8 * memory), "full")


def forecast(
    model: ModelConfig,
    *,
    frozen_bytes: int,
    learning: int,
    adapted: int,
    tokens: int,
    dtype: str,
    optimizer: str,
    processes: int = 1,
    sharded: bool = False,
) -> Forecast:
    """The arithmetic.

    Args:
        frozen_bytes: of weights that stay in memory.
        learning: parameters that learn; adapted: those of low-rank parts among them.
        tokens: of a batch.
        sharded: weights and what belongs to them are cut among the processes.
    """
    item = ITEM_BYTES[dtype]
    parts = processes if sharded else 1
    width = model.hidden_size
    inner = model.intermediate_size
    products = model.qkv_size + 2 * width + 3 * inner  # what a block's own weights make
    # norms in float32, rotated queries and keys, the gate, and what low-rank parts look at
    rest = 8 * width + 2 * model.qkv_size + 3 * inner + (4 * width + inner if adapted else 0)
    layers = model.num_hidden_layers
    whole = tokens * (products + rest) * item
    activations = {
        "none": layers * whole,
        "products": layers * tokens * (products + width) * item + whole,
        "full": layers * tokens * width * item + whole,
    }
    body = layers * (model.qkv_size * width + model.num_attention_heads * model.head_dim * width + 3 * inner * width)
    head = model.vocab_size * width
    backward = 2 if learning > adapted else 1  # of its inputs, and where it learns of the weight
    plain = 2.0 * (body + head) * (1 + backward) + 6.0 * adapted
    return Forecast(
        frozen=frozen_bytes // parts,
        learning=learning * (4 + 4 + _MOMENTS[optimizer]) // parts,
        activations={mode: size + _HEAD_BYTES for mode, size in activations.items()},
        runtime=RUNTIME_BYTES + _KEPT_BYTES + model.vocab_size * TOKEN_BYTES,
        operations={"none": plain, "products": plain, "full": plain + 2.0 * body + 2.0 * adapted},
    )
