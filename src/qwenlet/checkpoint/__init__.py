"""Weights on disk <-> weights in the model.

    source     the files as files: size and digest
    files      named tensors on disk: safetensors, PyTorch's .bin, GGUF
    gguf       GGUF's tensors, dequantized slice by slice
    gptq       AutoGPTQ's tensors, read as the floats they stand for
    names      how other layouts name and cut the same tensors
    load       skeleton on the meta device -> stream -> assign -> one report
    codes      modules that run weights in codes
    room       what memory a device has left, and whether a GPU has enough
    rounding   floats rounded to codes while they are read
    importance ... and how much each of their inputs counts
    tilefile   quantized modules in one file, in the kernels' order
    cached     ... kept in a cache
    partial    temporary names, and what a kill left under them
    save       the way back: folders and shards, random weights
    random     ... weights without files
    convert    ... in the published layout, as Qwen2, as GGUF
    gguf_out   ... a GGUF file, tensor by tensor
    quantized  ... in AutoGPTQ's layout

Read: the published Qwen-1 layout and the Qwen2/Llama layout in `.safetensors` or `.bin`, whole or sharded, of floats or
quantized by GPTQ, and GGUF.
No code of a checkpoint is executed.
"""

from qwenlet.checkpoint.cached import load_quantized
from qwenlet.checkpoint.convert import TARGETS, Change, convert, left_behind, write_new, write_trained
from qwenlet.checkpoint.dtypes import DTYPES, auto_dtype, check_dtype, device_by_name, dtype_by_name, dtype_name
from qwenlet.checkpoint.importance import rounding_of
from qwenlet.checkpoint.load import DEFAULT_SYSTEM, Checkpoint, LoadReport, Progress, load_model, read_tokenizer
from qwenlet.checkpoint.quantized import WeightOf, fit_layout, head_obstacle, write_quantized, write_rounded
from qwenlet.checkpoint.random import RandomCheckpoint
from qwenlet.checkpoint.room import check_room, free_memory
from qwenlet.checkpoint.rounding import Rounding
from qwenlet.checkpoint.save import new_folder, write_random
from qwenlet.checkpoint.source import Source

__all__ = [
    "DEFAULT_SYSTEM",
    "DTYPES",
    "TARGETS",
    "Change",
    "Checkpoint",
    "LoadReport",
    "Progress",
    "RandomCheckpoint",
    "Rounding",
    "Source",
    "WeightOf",
    "auto_dtype",
    "check_dtype",
    "check_room",
    "convert",
    "device_by_name",
    "dtype_by_name",
    "dtype_name",
    "fit_layout",
    "free_memory",
    "head_obstacle",
    "left_behind",
    "load_model",
    "load_quantized",
    "new_folder",
    "read_tokenizer",
    "rounding_of",
    "write_new",
    "write_quantized",
    "write_random",
    "write_rounded",
    "write_trained",
]
