"""These tests run the kernels in Triton's interpreter, on CPU tensors: `TRITON_INTERPRET=1` before triton is imported.

Where triton was imported by something else before, or is not there, they are skipped and say so.
"""

from __future__ import annotations

import os
import sys

import pytest

if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"
