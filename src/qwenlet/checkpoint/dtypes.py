"""Floating types and devices by the names users write."""

from __future__ import annotations

import torch

from qwenlet.errors import ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_ALIASES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}


def dtype_by_name(name: str) -> torch.dtype:
    """Raises ConfigError for a name that is none of bf16, fp16, fp32 (or their long forms)."""
    key = _ALIASES.get(name, name)
    if key not in DTYPES:
        raise ConfigError(f"dtype is {name!r}, expected 'auto' or one of {', '.join(DTYPES)}")
    return DTYPES[key]


def dtype_name(dtype: torch.dtype) -> str:
    """The short name: bf16, fp16 or fp32."""
    return next(name for name, value in DTYPES.items() if value == dtype)


def check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Raises ConfigError for a precision that no model here has, or that the device can't compute in."""
    if dtype not in DTYPES.values():
        raise ConfigError(f"dtype is {dtype}, expected one of {', '.join(DTYPES)}")
    if device.type != "cuda" or torch.version.hip or dtype is not torch.bfloat16:
        return
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ConfigError(
            f"dtype is bf16, but {torch.cuda.get_device_name(device)} (compute capability {major}.{minor}) has no "
            "bfloat16 arithmetic",
            hint="use fp16, fp32, or leave dtype out",
        )


def device_by_name(name: str) -> torch.device:
    """Raises ConfigError for a device that is not here, or not one of ours."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device is {name!r}, expected 'auto', 'cpu', 'cuda' or 'cuda:N'") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device is {name!r}, but torch {torch.__version__} sees no GPU here", hint="use device='cpu'"
        )
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {name!r}, expected 'auto', 'cpu', 'cuda' or 'cuda:N'")
    return device


def auto_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype that `auto` means on the device the model will live on, and why.

    The question is where the model lives, never whether a GPU is present somewhere.
    """
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        if torch.version.hip or major >= 8:
            return torch.bfloat16, "this GPU computes in bfloat16"
        if major >= 7:
            return torch.float16, "this GPU has no bfloat16, but fast float16"
        return torch.float32, "this GPU has neither bfloat16 nor fast float16"
    if device.type == "cpu":
        if _cpu_has_bf16():
            return torch.bfloat16, "this processor computes in bfloat16 (AVX-512 BF16 or AMX)"
        return torch.float32, "this processor has no bfloat16 arithmetic, and emulating it is slower than float32"
    return torch.float32, f"nothing is known of {device.type}"


def _cpu_has_bf16() -> bool:
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks if check is not None)
