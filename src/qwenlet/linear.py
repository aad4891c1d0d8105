"""Linears in the order their kernel wants, and the walk that swaps them in.

    PrepackedLinear   bfloat16 on a CPU: oneDNN's blocked weight order, packed once instead of at every call

A decoded token reads every weight once, so the order in memory decides the speed: one row of 2048 x 11008 moved at
12 GB/s through `F.linear` and at 18-23 GB/s prepacked on two cores of a Zen 4 (dev/LOG.md, 2026-11-22).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

# Rows oneDNN is told to expect when it chooses the blocked order. 16 measured best for one row and no worse for many.
_ROWS_HINT = 16


class PrepackedLinear(nn.Module):
    """y = x W^T + b with W [out, in] in oneDNN's own order. Inference only; `unpack` gives the plain weight back."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS_HINT)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """x [N, in] bfloat16 -> [N, out]."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    def unpack(self) -> Tensor:
        return self.packed.to_dense()


@lru_cache(maxsize=1)
def prepack_works() -> tuple[bool, str]:
    """Whether this torch and this processor can prepack bfloat16 linears, and why (not)."""
    if not torch.backends.mkldnn.is_available():
        return False, "this torch was built without oneDNN"
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False, "oneDNN has no bfloat16 kernels for this processor"
        probe = torch.ones(64, 64, dtype=torch.bfloat16)
        PrepackedLinear(probe, None)(probe[:1])
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return False, f"this torch lacks oneDNN's prepacked linear ({str(error).splitlines()[0]})"
    return True, "oneDNN keeps bfloat16 weights in blocked order"


def replace_linear(root: nn.Module, name: str, new: nn.Module) -> None:
    """Puts `new` where the dotted `name` stands under `root`."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, new)
