"""`qwenlet doctor`: what this machine has, what will run where, and why. Asks the code that decides; decides nothing.

A section that can't be examined says so in its row; the others are shown all the same. Opens no connection.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwenlet import __version__
from qwenlet.cli import console
from qwenlet.cli.options import new_app
from qwenlet.config import ATTENTION_BACKENDS
from qwenlet.errors import ConfigError, QwenletError
from qwenlet.machine import cpu_info, gpu_memory
from qwenlet.plan import Setup, available_memory, estimate

if TYPE_CHECKING:
    import torch

app = new_app()

# instruction sets that make a difference, by their names in /proc/cpuinfo
_CPU_FLAGS = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512f",),
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "BF16": ("avx512_bf16",),
    "AMX": ("amx_tile",),
}


@dataclass(frozen=True)
class Fact:
    """One row: `value` for programs, `text` the same for people, `why` where there is a reason to give."""

    name: str
    value: Any
    text: str = ""
    why: str = ""


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument(help="Say also what loading this model would take.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Say what this machine has, and what will run where and why."""
    sections: dict[str, Callable[[], Iterator[Fact]]] = {
        "software": _software,
        "machine": _machine,
        "precision": _precision,
        "kernels": _kernels,
        "models": _models,
    }
    if model is not None:
        sections["model"] = lambda: _model(model)
    facts = {title: list(_examined(collect)) for title, collect in sections.items()}
    if as_json:
        rows = {title: {f.name: {"value": f.value, "why": f.why} for f in section} for title, section in facts.items()}
        print(json.dumps(rows, ensure_ascii=False, indent=2))
    else:
        _print_tables(facts)
    if any(fact.name == "problem" for section in facts.values() for fact in section):
        raise typer.Exit(console.FAILURE)


def _examined(collect: Callable[[], Iterator[Fact]]) -> Iterator[Fact]:
    try:
        yield from collect()
    except QwenletError as problem:
        yield Fact("problem", problem.message, why=problem.hint or "")
    except Exception as problem:  # whatever is broken here is what the user came to learn
        yield Fact("problem", f"{type(problem).__name__}: {problem}")


def _print_tables(facts: dict[str, list[Fact]]) -> None:
    from rich.console import Console
    from rich.table import Table

    width = None if console.is_terminal(sys.stdout) else 160
    out = Console(width=width, highlight=False, markup=False, emoji=False)
    for title, section in facts.items():
        table = Table(title=title.capitalize(), title_justify="left", title_style="bold", box=None, show_header=False)
        table.add_column(style="cyan", min_width=16, no_wrap=True)
        table.add_column()
        table.add_column(style="dim")
        for fact in section:
            table.add_row(fact.name, console.printable(fact.text or str(fact.value)), console.printable(fact.why))
        out.print(table)
        out.print()


# -------------------------------------------------------------------------------------------------------- sections


def _software() -> Iterator[Fact]:
    yield Fact("qwenlet", __version__)
    yield Fact("Python", platform.python_version(), why=sys.executable)
    yield Fact("system", platform.platform())
    import torch

    yield Fact("torch", str(torch.__version__), why=f"kernels up to {torch.backends.cpu.get_cpu_capability()}")
    for extra in ("modelscope",):
        there = importlib.util.find_spec(extra) is not None
        yield Fact(extra, there, "installed" if there else f"not installed; pip install 'qwenlet[{extra}]' adds it")


def _machine() -> Iterator[Fact]:
    name, flags = cpu_info()
    yield Fact("processor", name)
    if flags:
        has = {label: any(flag in flags for flag in names) for label, names in _CPU_FLAGS.items()}
        yield Fact("instructions", has, ", ".join(f"{'' if there else 'no '}{label}" for label, there in has.items()))
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Fact("cores", usable, f"{usable} usable of {os.cpu_count()}")
    memory = available_memory()
    if memory is not None:
        yield Fact("memory", memory, f"{console.size(memory)} available")
    from qwenlet import hub

    cache = hub.cache_dir()
    free = shutil.disk_usage(next(p for p in (cache, *cache.absolute().parents) if p.exists())).free
    yield Fact("disk", free, f"{console.size(free)} free", f"for {cache}")
    import torch

    yield Fact("threads", torch.get_num_threads(), why="OMP_NUM_THREADS sets another number")
    if not torch.cuda.is_available():
        yield Fact("GPU", None, "none that torch can use")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        free, _ = torch.cuda.mem_get_info(index)
        about = f"{gpu.name}, {console.size(gpu.total_memory)}, {console.size(free)} free"
        yield Fact(f"cuda:{index}", gpu.total_memory, about, f"compute capability {gpu.major}.{gpu.minor}")


def _precision() -> Iterator[Fact]:
    from qwenlet.checkpoint import auto_dtype, dtype_name

    for device in _devices():
        dtype, why = auto_dtype(device)
        yield Fact(f"auto on {device}", dtype_name(dtype), why=why)


def _kernels() -> Iterator[Fact]:
    import torch

    from qwenlet.checkpoint import auto_dtype
    from qwenlet.linear import choose_linear
    from qwenlet.ops import cpu, triton
    from qwenlet.ops.attention import check_backend, flash_package

    kind, why = choose_linear("auto", torch.device("cpu"), torch.bfloat16)
    yield Fact("bf16 linears, cpu", "torch" if kind is None else kind.__name__, why=why)
    kernels = cpu.status()
    yield Fact("int4 and int8, cpu", kernels.isa or "the plain definition, slow", why=kernels.reason)
    status = triton.status()
    yield Fact("decoding, GPU", status.runs, "own kernels" if status.runs else "torch", why=status.reason)
    package = flash_package() is not None
    yield Fact("flash-attn", package, "installed" if package else "not installed", "its kernel reads prompts on a GPU")
    for device in _devices():
        dtype, _ = auto_dtype(device)
        usable = []
        for backend in ATTENTION_BACKENDS[1:]:
            try:
                check_backend(backend, device, dtype)
                usable.append(backend)
            except ConfigError:
                continue
        yield Fact(f"attention, {device}", usable, ", ".join(usable) or "none", "auto lets torch choose among these")


def _models() -> Iterator[Fact]:
    from qwenlet import hub

    offline = hub.is_offline(None)
    why = "QWENLET_OFFLINE or HF_HUB_OFFLINE is set" if offline else "QWENLET_OFFLINE=1 or --offline forbid it"
    yield Fact("network", not offline, "forbidden" if offline else "used when a model is not here", why)
    for model in hub.local_models():
        incomplete = f"incomplete, missing {', '.join(model.missing)}" if model.missing else ""
        yield Fact(model.name, model.size, console.size(model.size), incomplete)


def _model(name: str) -> Iterator[Fact]:
    from qwenlet import hub
    from qwenlet.checkpoint import Checkpoint
    from qwenlet.cli.plan import local_source, setup_of, weights_text

    path = hub.resolve(name, offline=True)
    config = Checkpoint.open(path).config
    yield Fact("path", str(path))
    yield Fact("type", config.model_type)
    yield Fact("parameters", config.parameter_count, f"{config.parameter_count:,}")
    yield Fact("context", config.context_length, f"{config.context_length:,} tokens")
    device = _devices()[-1]
    gpu = device.type == "cuda"
    setup = setup_of(local_source(name, path), gpu=gpu)
    needed = estimate(setup).peak
    yield Fact("weights", weights_text(setup))
    over = f"at most, over {setup.context:,} tokens; qwenlet plan tells the shares"
    yield Fact("needs", needed, f"{console.size(needed)} on {device}", over)
    memory = gpu_memory(device.index) if gpu else available_memory()
    if memory is not None:
        fits = needed <= memory
        yield Fact("fits", fits, "yes" if fits else "no", "" if fits else "qwenlet plan says what would")
    obstacle = _obstacle(setup, device)
    yield Fact("forward pass", obstacle is None, "own kernels" if obstacle is None else "by modules, more slowly",
               obstacle or "")  # fmt: skip


def _obstacle(setup: Setup, device: torch.device) -> str | None:
    """Why the model would not run by our kernels; None if it would."""
    from qwenlet.checkpoint import dtype_by_name
    from qwenlet.decode import obstacles
    from qwenlet.linear import TiledLinear, choose_linear
    from qwenlet.ops import cpu
    from qwenlet.program import shape_obstacle

    if device.type == "cuda":
        return obstacles.obstacle(device) or obstacles.shape_obstacle(setup.model)
    if setup.quantized:
        kernels = cpu.status()
        reason = kernels.reason if kernels.isa is None else None
    else:
        kind, why = choose_linear("auto", device, dtype_by_name(setup.dtype))
        reason = None if kind is TiledLinear else why
    return reason or shape_obstacle(setup.model)


def _devices() -> list[Any]:
    """The devices worth a row; the last one is where `auto` runs a model."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in reversed(range(count)))]
