"""The shape of the package: arrows point one way, importing costs nothing, the public names are the documented ones."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qwenlet

SOURCE = Path(qwenlet.__file__).parent

# Left never imports right; rooms of one rung don't import each other unless one stands left of the other here.
LADDER: list[list[str]] = [
    ["errors", "machine"],
    ["config", "gguf_header"],
    ["plan"],
    ["pretokenizer"],
    ["tokenizer_formats"],
    ["tokenizer_bytelevel", "tokenizer_export"],
    ["tokenizer"],
    ["chat", "vocabulary", "ops"],
    ["tools"],
    ["store"],
    ["cache", "grammar", "linear", "sampling"],
    ["model"],
    ["checkpoint", "decode", "hub", "program"],
    ["scoring"],
    ["lora"],
    ["engine", "quant"],
    ["llm"],
    ["api"],
    ["hf", "server", "evals", "train", "profiling"],
    ["verify"],
    ["cli"],
    ["__main__"],
]
RUNG = {room: height for height, rooms in enumerate(LADDER) for room in rooms}
NO_TORCH = ["errors", "machine", "config", "gguf_header", "plan", "pretokenizer", "tokenizer_formats",
            "tokenizer_bytelevel", "tokenizer_export", "tokenizer", "chat", "tools", "store", "vocabulary", "hub",
            "cli"]  # fmt: skip


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: Path) -> set[str]:
    """Every qwenlet module a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "qwenlet":
                found |= {f"qwenlet.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "qwenlet" and name != "qwenlet"}


def test_every_room_has_its_rung() -> None:
    rooms = {p.stem if p.is_file() else p.name for p in SOURCE.iterdir() if p.suffix == ".py" or p.is_dir()}
    assert rooms - {"__init__", "__pycache__", "py.typed"} == set(RUNG)


def test_arrows_point_one_way() -> None:
    wrong = []
    for path in SOURCE.rglob("*.py"):
        module = ".".join(["qwenlet", *path.relative_to(SOURCE).with_suffix("").parts])
        here = room_of(module)
        if here == "__init__":
            continue
        for target in imports(path):
            there = room_of(target)
            if there in RUNG and there != here and RUNG[there] >= RUNG[here]:
                wrong.append(f"{module} -> {target}")
    assert not wrong, f"arrows that point the wrong way: {wrong}"


def test_no_cycle_inside_a_room() -> None:
    for room in (p for p in SOURCE.iterdir() if p.is_dir() and p.name != "__pycache__"):
        graph: dict[str, set[str]] = {}
        for path in room.glob("*.py"):
            module = f"qwenlet.{room.name}" + ("" if path.stem == "__init__" else f".{path.stem}")
            graph[module] = {t for t in imports(path) if t.startswith(f"qwenlet.{room.name}.")}
        seen: set[str] = set()

        def walk(module: str, trail: tuple[str, ...], graph: dict[str, set[str]], seen: set[str]) -> None:
            assert module not in trail, f"cycle: {' -> '.join([*trail, module])}"
            if module in seen:
                return
            seen.add(module)
            for target in graph.get(module, ()):
                walk(target, (*trail, module), graph, seen)

        for module in graph:
            walk(module, (), graph, seen)


@pytest.mark.parametrize("room", ["__init__", *NO_TORCH])
def test_light_rooms_load_no_torch(room: str) -> None:
    name = "qwenlet" if room == "__init__" else f"qwenlet.{room}"
    code = (
        f"import sys, {name}; heavy = {{'torch', 'gguf', 'transformers'}} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_resolve_and_are_documented() -> None:
    for name in qwenlet.__all__:
        thing = getattr(qwenlet, name)
        assert name == "__version__" or thing.__doc__, name
    assert set(dir(qwenlet)) == set(qwenlet.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        qwenlet.nonsense  # noqa: B018


def test_a_model_is_loaded_without_torchs_compiler() -> None:
    """torch._dynamo takes a second to import, and several of torch's modules bring it."""
    code = "import sys, qwenlet; qwenlet.LLM; print([m for m in sys.modules if m.startswith('torch._dynamo')][:1])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
