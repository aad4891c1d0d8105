"""Libraries that some scores need: the extra `evals`."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

from qwenlet.errors import MissingExtraError


def library(name: str, purpose: str) -> ModuleType:
    """The module, or MissingExtraError; `purpose` is a noun phrase."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a library warns of when it is imported is not the caller's doing
            return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(name.partition(".")[0], "evals", purpose) from error
