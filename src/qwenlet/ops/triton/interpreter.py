"""Repairs of Triton 3.6's interpreter, which runs kernels on a CPU. Compiled kernels have nothing to do with this.

a loop's bound may be a number from memory: numpy 2.4 takes no array of one element for an index
products of bfloat16: the interpreter holds it as whole numbers, and multiplied those
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
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    patch, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def floats(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def repaired(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, floats(a), floats(b), *rest)

    interpreter._patch_lang_tensor = patched
    interpreter.InterpreterBuilder.create_dot = repaired
