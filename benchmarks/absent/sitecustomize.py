"""Python imports this first where its folder is on PYTHONPATH: packages that aren't installed can then be imported, and
whoever uses something of them is told. Nothing that runs on a GPU needs them: reading files, text and command lines do.
A process started by such a process gets the same.
"""

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

OPTIONAL = ("tiktoken", "regex", "safetensors", "gguf", "huggingface_hub", "platformdirs", "typer", "rich",
            "prompt_toolkit", "llguidance", "msgspec")  # fmt: skip


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what nobody else has found."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        top, _, below = name.partition(".")
        # a package that is here may lack a name, which is then looked for as a module of it
        absent = top in OPTIONAL and (not below or isinstance(sys.modules.get(top), _Stub))
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if absent else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


class _Stub(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*_: object, **__: object) -> None:
            raise ModuleNotFoundError(f"{self.__name__} is not installed here")

        return _Names(name, (Exception,), {"__init__": refuse})


class _Names(type):
    """Of a class that isn't here: an enumeration's members are read where a module is imported."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


sys.meta_path.append(Absent())  # behind all others: what is here is found first
