"""Triton's interpreter on a numpy that is newer than it: a loop's bound may be a number from memory again.

numpy 2.4 takes no array of one element for an index, and Triton 3.6's interpreter keeps its numbers in such arrays.
Compiled kernels have nothing to do with this.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from qwenlet.ops.triton import interpreted


@lru_cache(maxsize=1)
def repair() -> None:
    """Does nothing where kernels are compiled. To be called before the first of them runs."""
    if not interpreted():
        return
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
