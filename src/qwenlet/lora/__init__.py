"""Low-rank adapters (LoRA): a frozen model, and beside some of its linears the product of two narrow matrices.

layers    the modules that train: `add_lora`, `trainable`
product   what they compute, as one node of autograd
adapter   the folder an adapter lives in, in peft's format, read and written
"""

from qwenlet.config import LoraConfig
from qwenlet.lora.adapter import Adapter, Factors, load_adapter, save_adapter
from qwenlet.lora.layers import LoraLinear, add_lora, trainable
from qwenlet.lora.rows import LoadedAdapter

__all__ = [
    "Adapter",
    "Factors",
    "LoadedAdapter",
    "LoraConfig",
    "LoraLinear",
    "add_lora",
    "load_adapter",
    "save_adapter",
    "trainable",
]
