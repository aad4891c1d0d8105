"""Repairs of Triton 3.6's interpreter, which runs kernels on a CPU. Compiled kernels have nothing to do with this.

* A loop's bound may be a number from memory: numpy 2.4 takes no array of one element for an index.
* bfloat16: the interpreter holds it as whole numbers, multiplied those in `dot`, and rounded to it towards 0.
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

    builder, handle_of = interpreter.InterpreterBuilder, interpreter.TensorHandle
    patch, dot, cast = interpreter._patch_lang_tensor, builder.create_dot, builder.cast_impl

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def floats(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return handle_of((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def product(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, floats(a), floats(b), *rest)

    def converted(self: Any, source: Any, wanted: Any) -> Any:
        if wanted.scalar != tl.bfloat16:
            return cast(self, floats(source), wanted)
        if source.dtype.scalar == tl.bfloat16:
            return source
        values = np.ascontiguousarray(source.data, np.float32)
        bits = values.view(np.uint32)
        nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return handle_of(np.where(values == values, nearest, 0x7FC0).astype(np.uint16), tl.bfloat16)

    interpreter._patch_lang_tensor = patched
    builder.create_dot, builder.cast_impl = product, converted
