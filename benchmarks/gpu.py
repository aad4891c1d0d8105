"""Every kernel against its definition, the decode step against the modules, and the profile: `sh benchmarks/gpu.sh`.

Each part is a process of its own with a limit of time, so that one that fails, hangs or poisons the device loses no
other. Parts say what they find as it comes, one JSON object a line of a file; what a killed part had said is kept.
Runs from src/ without an installation: packages that only files and text need may be missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

LIMIT = 470  # seconds, of everything
ABSENT = Path(__file__).parent / "absent"  # lets parts import packages that no GPU needs


def say(**fact: Any) -> None:
    """One object to the parent, and in words to whoever watches."""
    with open(os.environ["FACTS"], "a", encoding="utf-8") as file:
        file.write(json.dumps(fact, default=str) + "\n")


# --------------------------------------------------------------------------------------------------- the parts


def environment(device: str, tiny: bool) -> None:
    import torch
    from sitecustomize import OPTIONAL, Absent

    found: dict[str, Any] = {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda}
    for name in ("triton", "numpy", "transformers", "flash_attn", *OPTIONAL):
        spec = importlib.util.find_spec(name)
        there = spec is not None and not isinstance(spec.loader, Absent)
        found[name] = getattr(__import__(name), "__version__", True) if there and name in ("triton", "numpy") else there
    if device != "cpu":
        gpu = torch.cuda.get_device_properties(device)
        free, whole = torch.cuda.mem_get_info(device)
        found |= {"gpu": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory": whole, "free": free}
    say(**found)


def kernels(device: str, tiny: bool) -> None:
    """Every kernel, in every form it has, against torch's operations in float64 or the decode step's own definition."""
    import torch
    from torch.nn.functional import linear as product
    from torch.nn.functional import silu

    from qwenlet.linear import on_device
    from qwenlet.ops.packing import QuantTensor, Tiles, to_tiles
    from qwenlet.ops.triton import linear as ops
    from qwenlet.ops.triton.scratch import Scratch

    where = torch.device(device)
    torch.manual_seed(0)
    scratch = Scratch(where)
    n, k = (48, 64) if tiny else (2048, 2048)
    # each launch for a row, for up to 16, 32 and 64 is a kernel of its own to compile, which is most of the time
    rows = (1, 3) if tiny else (1, 2, 5, 16, 17, 64)
    floats = (torch.bfloat16, torch.float16, torch.float32)
    in_all = ("floats", "int4/32 symmetric", "int8/32 symmetric")  # forms in all launches and precisions

    def codes(bits: int, group: int, kind: str) -> QuantTensor:
        values = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
        scales = (torch.rand(n, k // group) * 0.02 + 0.001).half()
        zeros = torch.randint(1, 1 << bits, scales.shape, dtype=torch.uint8) if kind == "zeros" else None
        minimums = -scales if kind == "minimums" else None
        order = torch.randperm(k) if kind == "order" else None
        return QuantTensor(bits, group, values, scales, zeros, minimums, order)

    def weights(dtype: torch.dtype) -> Iterator[tuple[str, Any, Any]]:
        plain = (torch.randn(n, k) * 0.03).to(where, dtype)
        yield "floats", plain, plain.double()
        for bits in (4, 8):
            for group in (32,) if tiny else (32, 64, 128):
                for kind in ("symmetric", "zeros", "minimums", "order"):
                    weight = codes(bits, group, kind)
                    moved = on_device(to_tiles(weight), where)
                    yield f"int{bits}/{group} {kind}", moved, weight.dequantize().to(where).double()

    for dtype in floats:
        for name, weight, exact in weights(dtype):
            if name not in in_all and dtype != torch.bfloat16:
                continue
            form = f"{name} {str(dtype).removeprefix('torch.')}"
            if isinstance(weight, Tiles):
                check(f"dequantize {form}", lambda w=weight, d=dtype: ops.dequantize(w, d), lambda e=exact: e, dtype)
            for m in rows if name in in_all and dtype == torch.bfloat16 else (1, 3):
                x = torch.randn(m, k, device=where).to(dtype)
                scale = (1 + 0.1 * torch.randn(k, device=where)).to(dtype)
                bias, rest = torch.randn(n, device=where), torch.randn(m, n, device=where).to(dtype)
                x64 = x.double()
                normed = (x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + 1e-6)) * scale.double()
                check(
                    f"norm_linear {form} x{m}",
                    lambda x=x, s=scale, w=weight, b=bias: ops.norm_linear(x, s, 1e-6, w, b, scratch=scratch),
                    lambda y=normed, e=exact, b=bias: product(y, e, b.double()), dtype,
                )  # fmt: skip
                if name not in in_all:
                    continue  # what reads the weight is the same in the others
                check(
                    f"linear_add {form} x{m}",
                    lambda x=x, w=weight, r=rest: ops.linear_add(x, w, r.clone(), scratch=scratch),
                    lambda x=x64, e=exact, r=rest: r.double() + product(x, e), dtype,
                )  # fmt: skip
                check(
                    f"norm_swiglu {form} x{m}",
                    lambda x=x, s=scale, w=weight: ops.norm_swiglu(x, s, 1e-6, w, w, scratch=scratch),
                    lambda y=normed, e=exact: product(y, e) * silu(product(y, e)), dtype,
                )  # fmt: skip


def check(name: str, run: Callable[[], Any], exact: Callable[[], Any], dtype: Any) -> None:
    """The largest error as a share of the largest value, beside what the precision allows."""
    import torch

    # sums in float32, inputs and outputs rounded a few times on the way
    allowed = {torch.bfloat16: 0.03, torch.float16: 0.004, torch.float32: 5e-5}[dtype]
    try:
        found, wanted = run().double(), exact()
        error = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9))
        say(check=name, error=error, allowed=allowed, passed=error <= allowed)
    except Exception as problem:
        say(check=name, passed=False, problem=f"{type(problem).__name__}: {problem}"[:500])


def steps(device: str, tiny: bool) -> None:
    """Whole decode steps: the kernels, recorded and replayed, against torch's operations on the same pages; attention
    over long rows, sampling with every setting, and tokens that go from step to step on the device."""
    import torch

    from qwenlet.cache import PagePool, pages_for
    from qwenlet.config import ModelConfig, SamplingParams
    from qwenlet.decode import Decoder, Row

    where = torch.device(device)
    heads, dim = (2, 16) if tiny else (16, 128)
    config = ModelConfig(
        model_type="qwen", vocab_size=1024 if tiny else 151_936, hidden_size=heads * dim, num_hidden_layers=2,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=dim, intermediate_size=96 if tiny else 5504,
        max_position_embeddings=8192, seq_length=2048, use_dynamic_ntk=True, use_logn_attn=True,
    )  # fmt: skip
    lengths = (3, 70) if tiny else (1, 63, 64, 65, 700, 4000)
    settings = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.2),
        SamplingParams(temperature=0.7, top_k=20, presence_penalty=0.4),
        SamplingParams(temperature=1.3, min_p=0.05, frequency_penalty=0.2),
        SamplingParams(temperature=1.0),
    ]
    for dtype, cache in (
        (torch.float32, torch.float32), (torch.float32, torch.int8), (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.int8), (torch.float16, torch.float16),
    ):  # fmt: skip
        name = f"step {str(dtype).removeprefix('torch.')}, cache {str(cache).removeprefix('torch.')}"
        try:
            model = random_model(config, dtype, where)
            answers = []
            for own in (False, True):
                torch.manual_seed(1)
                pool = PagePool(config, sum(pages_for(n + 8) for n in lengths), cache, where)
                fill(pool)
                decoder = Decoder(model, pool, len(lengths), pages_for(max(lengths) + 8), where, kernels=own)
                tables = [pool.take(pages_for(n + 8)) for n in lengths]
                slots = [decoder.slots.take() or 0 for _ in lengths]
                for slot in slots:
                    decoder.slots.begin(slot, 1.0, True)
                    decoder.slots.count(slot, None)
                logits, tokens = [], []
                for later in range(4):
                    launch = decoder.launch([
                        Row(("reply", at), slots[at], 5 if later == 0 else None, at, n + later, tables[at],
                            settings[at % len(settings)], 0.137 * at + 0.01 * later, at % 2 == 1)
                        for at, n in enumerate(lengths)
                    ])  # fmt: skip
                    logits.append(launch.logits.float().cpu().clone())
                    tokens.append(launch.tokens())
                answers.append((logits, tokens))
            (plain, expected), (found, drawn) = answers
            error = float((found[0] - plain[0]).abs().max() / plain[0].abs().max())
            allowed = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.06}[dtype]
            if cache == torch.int8:
                allowed = max(allowed, 0.02)  # a number at the edge between two codes falls to the other
            same = sum(a == b for one, two in zip(drawn, expected, strict=True) for a, b in zip(one, two, strict=True))
            whole = len(drawn) * len(lengths)
            exact = dtype == torch.float32 and cache == dtype
            say(check=name, error=error, allowed=allowed, tokens_alike=f"{same}/{whole}",
                passed=error <= allowed and (same == whole or not exact))  # fmt: skip
        except Exception as problem:
            traceback.print_exc()
            say(check=name, passed=False, problem=f"{type(problem).__name__}: {problem}"[:500])


def random_model(config: Any, dtype: Any, device: Any) -> Any:
    import torch

    from qwenlet.model import Qwen

    with torch.device("meta"):
        model = Qwen(config)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0) if "ln_" in name else parameter.normal_(std=0.05)
    return model


def coded(model: Any) -> tuple[Any, Any]:
    """The model with its linears in four bits where it lies, and the same with floats that are worth as much."""
    import copy

    import torch

    from qwenlet.linear import QuantLinear, on_device, replace_linear
    from qwenlet.ops.packing import to_tiles
    from qwenlet.ops.rounding import round_to_nearest

    floats = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            codes = round_to_nearest(module.weight.data, 4, 32)
            floats.get_submodule(name).weight.data = codes.dequantize().to(module.weight.dtype)
            tiles = on_device(to_tiles(codes), module.weight.device)
            replace_linear(model, name, QuantLinear(tiles, module.bias))
    return model, floats


def training(device: str, tiny: bool) -> None:
    """Q-LoRA: gradients beside weights in codes against those beside floats, then what a step of the full size takes
    (1 x 256 tokens, rank 64)."""
    from dataclasses import replace

    import torch

    from qwenlet import linear
    from qwenlet.cache import Rows
    from qwenlet.config import LoraConfig, qwen_1_8b
    from qwenlet.lora import add_lora
    from qwenlet.train.loss import head_loss

    where = torch.device(device)
    if where.type == "cpu":  # a GPU's code all the same, by the interpreter
        linear._on_gpu = lambda tiles: True
    small = replace(
        qwen_1_8b(), vocab_size=1024 if tiny else 20_000, hidden_size=64, num_attention_heads=2, num_key_value_heads=2,
        head_dim=32, intermediate_size=96, num_hidden_layers=2,
    )  # fmt: skip

    def step(model: Any, length: int) -> Any:
        ids = torch.randint(model.config.vocab_size, (length + 1,), generator=torch.Generator().manual_seed(0))
        rows = Rows.fresh([length], [1.0], where)
        loss = head_loss(model.lm_head, model.hidden(ids[:-1].to(where), rows), ids[1:].to(where)) / length
        loss.backward()
        return loss.detach()

    for dtype, allowed in ((torch.float32, 1e-4), (torch.bfloat16, 0.06)):
        name = f"qlora {str(dtype).removeprefix('torch.')}"
        try:
            torch.manual_seed(0)
            answers = []
            for model in coded(random_model(small, dtype, where)):
                torch.manual_seed(1)
                add_lora(model, LoraConfig(rank=4, dropout=0.0))
                for parameter in (p for p in model.parameters() if p.requires_grad):
                    torch.nn.init.normal_(parameter, std=0.05)
                loss = step(model.train(), 48)
                answers.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
            error = max(
                float((found - wanted).double().norm() / wanted.double().norm().clamp_min(1e-9))
                for found, wanted in zip(*answers, strict=True)
            )
            say(check=name, error=error, allowed=allowed, passed=error <= allowed)
        except Exception as problem:
            traceback.print_exc()
            say(check=name, passed=False, problem=f"{type(problem).__name__}: {problem}"[:500])
    config = small if tiny else qwen_1_8b()
    for name in ("lora", "qlora"):
        model = random_model(config, torch.bfloat16, where)
        if name == "qlora":
            model = coded(model)[0]
        add_lora(model, LoraConfig())
        model.train()
        if where.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(4):
            began = time.perf_counter()
            step(model, 256 if not tiny else 16)
            if where.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        peak = torch.cuda.max_memory_allocated() / 1e9 if where.type == "cuda" else None
        say(training=name, seconds=sorted(times)[1], peak_gb=peak)
        del model


def fill(pool: Any) -> None:
    """Numbers like those of a past, scales included."""
    import torch

    for table in (*pool.k, *pool.v):
        table.random_(-127, 128) if table.dtype == torch.int8 else table.normal_()
    for scales in (*(pool.k_scales or ()), *(pool.v_scales or ())):
        scales.fill_(1 / 127)


def profile(device: str, tiny: bool, precision: str, attention: str) -> None:
    """Rows of `qwenlet profile` in one precision, each as soon as it is measured."""
    from qwenlet.profiling.report import markdown
    from qwenlet.profiling.session import Hooks, Session
    from qwenlet.profiling.subject import Subject
    from qwenlet.profiling.workload import Workload

    seen = [0]
    main = attention == "own"
    peer = main and precision == "bf16" and importlib.util.find_spec("transformers") is not None
    size: dict[str, Any] = {"generate": (2048, 8192), "encode": 2048, "prefill": (512, 2048), "batch": (1, 8, 64)}
    if tiny:
        size = {"generate": (4,), "encode": 8, "prefill": (8,), "batch": (2,), "batch_tokens": 2}
    if not main:
        size = {"generate": (256,), "encode": 0, "prefill": (), "batch": ()}
    workload = Workload(
        precisions=(precision,), attention=(attention,), rounds=1, limit_seconds=15.0,
        peer="transformers" if peer and not tiny else None, **size,
    )  # fmt: skip

    def kept(found: Any) -> None:
        told = found.to_dict()
        for row in told["rows"][seen[0] :]:
            say(row=row)
        seen[0] = len(told["rows"])
        say(ceilings=told["ceilings"])
        latest[0] = found

    latest: list[Any] = [None]
    subject = Subject(f"random:{'tiny' if tiny else '1.8b'}", device)
    try:
        Session(subject, workload, Hooks(lambda text: print(text, file=sys.stderr, flush=True), kept)).run()
    finally:
        if latest[0] is not None:
            print(markdown(latest[0]), flush=True)


def plan(tiny: bool, cpu: bool) -> list[tuple[str, list[str], float]]:
    """(name, arguments, seconds at most), the most telling first."""
    parts: list[tuple[str, list[str], float]]
    parts = [("environment", [], 60.0), ("steps", [], 90.0), ("kernels", [], 120.0), ("training", [], 60.0)]
    parts += [(f"profile {precision}", [precision, "own"], 100.0) for precision in ("bf16", "int4", "int8", "fp32")]
    if not cpu:
        parts += [(f"profile bf16 {other}", ["bf16", other], 40.0) for other in ("sdpa", "math")]
    return parts


# --------------------------------------------------------------------------------------------------- the parent


def run_part(name: str, words: list[str], options: list[str], seconds: float) -> dict[str, Any]:
    """What a part said, and how it ended."""
    began = time.monotonic()
    handle, path = tempfile.mkstemp(suffix=".jsonl")
    os.close(handle)
    command = [sys.executable, __file__, "--part", name.split()[0], *options, "--", *words]
    paths = os.pathsep.join([str(ABSENT), *filter(None, [os.environ.get("PYTHONPATH")])])
    child = subprocess.Popen(command, env=os.environ | {"FACTS": path, "PYTHONPATH": paths}, stdout=sys.stderr)
    ended = "ok"
    try:
        if child.wait(timeout=max(seconds, 1.0)):
            ended = f"exit status {child.returncode}"
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        ended = f"stopped after {seconds:.0f} s"
    facts = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            with suppress(ValueError):  # half a line of a part that was stopped
                facts.append(json.loads(line))
    Path(path).unlink()
    return {"ended": ended, "seconds": round(time.monotonic() - began, 1), "facts": facts}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for trying the script itself")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for everything")
    parser.add_argument("--only", help="one part: environment, steps, kernels, training or profile")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    if asked.part:
        globals()[asked.part](asked.device, asked.tiny, *asked.words)
        return 0
    end = time.monotonic() + asked.limit
    options = ["--device", asked.device, *(["--tiny"] if asked.tiny else [])]
    found: dict[str, Any] = {}
    for name, words, seconds in plan(asked.tiny, asked.device == "cpu"):
        if asked.only and name.split()[0] != asked.only:
            continue
        left = end - time.monotonic()
        if left < 5:
            found[name] = {"ended": "not begun: no time was left", "facts": []}
            continue
        print(f"== {name}, at most {min(seconds, left):.0f} s", file=sys.stderr, flush=True)
        found[name] = run_part(name, words, options, min(seconds, left))
        checks = [fact for fact in found[name]["facts"] if "check" in fact]
        for fact in checks:
            if not fact["passed"]:
                print(f"FAILED {fact}", file=sys.stderr, flush=True)
        for fact in found[name]["facts"]:
            if fact.get("row", {}).get("problem"):
                print(f"NOT MEASURED {fact['row']}", file=sys.stderr, flush=True)
        passed = f", {sum(fact['passed'] for fact in checks)} of {len(checks)} checks passed" if checks else ""
        print(f"== {name}: {found[name]['ended']} in {found[name].get('seconds', 0)} s{passed}", file=sys.stderr)
    facts = [fact for part in found.values() for fact in part["facts"]]
    failed = sum("passed" in fact and not fact["passed"] for fact in facts)
    missing = sum(bool(fact.get("row", {}).get("problem")) for fact in facts)
    ended = all(part["ended"] == "ok" for part in found.values())
    repository = Path(__file__).resolve().parent.parent.name
    told = {"repository": repository, "failed_checks": failed, "rows_not_measured": missing, "parts": found}
    print(json.dumps(told))
    return 0 if ended and not failed and not missing else 1


if __name__ == "__main__":
    sys.exit(main())
