"""Bytes of a file as a tensor, mapped: read when they are looked at, and no longer ours when the tensor is gone."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def mapped_bytes(path: Path, offset: int, size: int) -> Tensor:
    """[size] uint8, of the file from `offset` on; writing to it doesn't reach the file.

    Raises:
        OSError: the file can't be mapped.
    """
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    try:
        # a mapping per tensor, and no open file behind it
        whole = torch.from_file(str(path), shared=False, size=offset + size, dtype=torch.uint8)
    except RuntimeError as error:
        raise OSError(f"{path} can't be mapped: {str(error).splitlines()[0]}") from None
    return whole[offset:]
