"""Weights on disk <-> weights in the model.

    files    named tensors on disk: safetensors, PyTorch's .bin, GGUF
    gguf     GGUF's tensors, dequantized slice by slice
    names    how other layouts name and cut the same tensors
    load     skeleton on the meta device -> stream -> assign -> one report
    save     the way back, in the published layout

Read: the published Qwen-1 layout and the Qwen2/Llama layout in `.safetensors` or `.bin`, whole or sharded, and GGUF.
No code of a checkpoint is executed.
"""

from qwenlet.checkpoint.dtypes import DTYPES, auto_dtype, dtype_by_name, dtype_name
from qwenlet.checkpoint.load import DEFAULT_SYSTEM, Checkpoint, LoadReport, Progress, load_model
from qwenlet.checkpoint.save import convert, new_folder, write_random

__all__ = [
    "DEFAULT_SYSTEM",
    "DTYPES",
    "Checkpoint",
    "LoadReport",
    "Progress",
    "auto_dtype",
    "convert",
    "dtype_by_name",
    "dtype_name",
    "load_model",
    "new_folder",
    "write_random",
]
