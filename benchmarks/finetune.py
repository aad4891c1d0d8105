"""What does a LoRA step cost at full size, beside what a user would pick instead, and what does packing save?

`step`: Qwen-1.8B in bfloat16, rank 64 beside c_attn, c_proj, w1 and w2, one sample of 256 tokens, every one of them
foretold, AdamW in float32; gradient checkpointing on both sides. Of ours "full" computes everything in a block again,
as peft does, "products" all but the products with its weights, "none" nothing. "peft" is peft over transformers'
Qwen2ForCausalLM with the same weights, optimizer and threads. Each side runs in a process of its own, in turn, and the
peak is the process's (VmHWM).

`packed`: tokens of real samples each second, packed, beside batches of 8 padded to their longest: as ours, with logits
where a token is learned only; with logits everywhere; and with torch's attention too, which is how trainers that hand
labels to a model have it. DATA are records of dialogues, or of `input` ("### Human: ... ### Assistant:" by turns) and
`output`, which become messages here.

    qwenlet random OUT --like qwen-1.8b          # once: full size, random weights, 3.7 GB
    python benchmarks/finetune.py step OUT --threads 2
    python benchmarks/finetune.py packed MODEL DATA.jsonl --threads 2

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

LENGTH = 256
SIDES = ["lora, full", "lora, products", "lora, none", "qlora, full", "qlora, products", "peft"]
# of the published card, on an A100 with 80 GB: GB and seconds a step (batch 1, 8 accumulated, 256 tokens)
CARD = {"lora": (6.7, 1.0), "qlora": (5.8, 1.4), "full": (43.5, 2.1)}


def peak_gb() -> float:
    """The most memory this process ever had resident."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def timed(step: Callable[[], Any], rounds: int) -> list[float]:
    times = []
    for number in range(rounds + 2):
        begun = time.perf_counter()
        step()
        if number >= 2:  # the first ones read the file and warm up
            times.append(time.perf_counter() - begun)
    return times


def batch_ids(vocabulary: int) -> torch.Tensor:
    return torch.randint(vocabulary, (LENGTH + 1,), generator=torch.Generator().manual_seed(0))


def ours(path: Path, recompute: str, rounds: int, quant: bool = False) -> list[float]:
    from qwenlet.cache import Rows
    from qwenlet.checkpoint import Checkpoint, load_model
    from qwenlet.config import LoraConfig
    from qwenlet.lora import add_lora
    from qwenlet.train.loss import head_loss

    if quant:
        from qwenlet import hub
        from qwenlet.checkpoint import load_quantized
        from qwenlet.config import QuantConfig
        from qwenlet.train.learning import compute_in

        checkpoint = Checkpoint.open(path)
        rounding = QuantConfig.named("int4").fit(checkpoint.config)
        model, _ = load_quantized(checkpoint, rounding, hub.cache_dir() / "kernels")
        compute_in(model, torch.bfloat16)
    else:
        model, _ = load_model(Checkpoint.open(path), torch.bfloat16, torch.device("cpu"))
    add_lora(model, LoraConfig())
    model.train()
    model.transformer.recompute = recompute  # type: ignore[assignment]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    ids = batch_ids(model.config.vocab_size)
    rows = Rows.fresh([LENGTH], [1.0])

    def step() -> None:
        loss = head_loss(model.lm_head, model.hidden(ids[:-1], rows), ids[1:])
        (loss / LENGTH).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return timed(step, rounds)


def peft(path: Path, rounds: int) -> list[float]:
    from peft import LoraConfig, get_peft_model

    from qwenlet.checkpoint import Checkpoint
    from qwenlet.profiling.peer import peer_model

    model = peer_model(Checkpoint.open(path), torch.bfloat16, torch.device("cpu"))
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model = get_peft_model(
        model,
        LoraConfig(
            r=64, lora_alpha=16, lora_dropout=0.05, task_type="CAUSAL_LM",
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        ),
    )  # fmt: skip
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    ids = batch_ids(model.config.vocab_size)[None]

    def step() -> None:
        # the model shifts labels itself: 257 ids foretell 256
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return timed(step, rounds)


def one_side(side: str, path: Path, rounds: int, threads: int) -> dict[str, Any]:
    """Runs one side in a process of its own."""
    command = [sys.executable, __file__, "side", side, str(path), "--rounds", str(rounds), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def step_table(path: Path, rounds: int, turns: int, threads: int, sides: list[str]) -> dict[str, Any]:
    results: dict[str, dict[str, Any]] = {side: {"times": [], "peak_gb": 0.0} for side in sides}
    for _ in range(turns):
        for side in sides:
            run = one_side(side, path, rounds, threads)
            results[side]["times"] += run["times"]
            results[side]["peak_gb"] = max(results[side]["peak_gb"], run["peak_gb"])
    print(f"\n| LoRA step, 1 x {LENGTH} tokens, {threads} threads | s, median | of peft's | peak GB |")
    print("|---|---|---|---|")
    base = statistics.median(results["peft"]["times"]) if "peft" in results else None
    for side, result in results.items():
        result["median"] = statistics.median(result["times"])
        share = f"{result['median'] / base:.2f}" if base else ""
        print(f"| {side} | {result['median']:.2f} | {share} | {result['peak_gb']:.2f} |")
    for name, (gb, seconds) in CARD.items():
        print(f"| published card, {name}, A100 (batch 1, 8 accumulated) | {seconds:.1f} | | {gb:.1f} |")
    return results


def as_messages(data: Path, folder: Path) -> Path:
    """Records of `input`, whose turns are marked, and `output` -> records of messages; other records as they are."""
    made = []
    for line in data.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if not {"input", "output"} <= record.keys():
            return data
        parts = re.split(r"### (Human|Assistant):", record["input"])
        if parts[0].strip():
            sys.exit(f"a record begins with {parts[0][:40]!r}, expected '### Human:'")
        turns = [
            {"role": "user" if role == "Human" else "assistant", "content": text.strip()}
            for role, text in zip(parts[1::2], parts[2::2], strict=True)
        ]
        turns[-1] = {"role": "assistant", "content": record["output"].strip()}  # the input ends with an empty one
        made.append(json.dumps({"messages": turns}))
    path = folder / "messages.jsonl"
    path.write_text("\n".join(made) + "\n", encoding="utf-8")
    return path


def packed_table(model: str, data: Path, batches: int, turns: int) -> dict[str, Any]:
    """Real tokens each second, forward and backward of a LoRA step: the same samples each way, the ways in turn."""
    import qwenlet
    from qwenlet import hub
    from qwenlet.cache import Rows
    from qwenlet.checkpoint import Checkpoint, load_model
    from qwenlet.config import DataConfig, LoraConfig
    from qwenlet.lora import add_lora
    from qwenlet.ops.attention import attention_backend
    from qwenlet.train.batches import epoch_batches, in_order
    from qwenlet.train.loss import IGNORED, head_loss
    from qwenlet.train.objective import NextToken, rows_of
    from qwenlet.train.samples import load_samples

    path = hub.resolve(model)
    with qwenlet.load(model) as loaded:
        tokenizer = loaded.tokenizer
    config = DataConfig(max_length=512)
    with tempfile.TemporaryDirectory() as folder:
        samples = load_samples([as_messages(data, Path(folder))], tokenizer, config, system=None)
    network, _ = load_model(Checkpoint.open(path), torch.bfloat16, torch.device("cpu"))
    add_lora(network, LoraConfig())
    network.train()
    network.transformer.recompute = "none"
    objective = NextToken(samples)
    device = torch.device("cpu")

    def packed(batch: tuple[int, ...]) -> None:
        objective.loss(network, batch, device).backward()

    def padded(batch: tuple[int, ...], everywhere: bool, attention: str = "auto") -> None:
        """As collators do: every sample as long as the longest, what is behind its end computed and not counted."""
        longest = int(max(samples.lengths[index] for index in batch))
        ids, targets, _ = rows_of(samples, batch, network, device)
        lengths = [int(samples.lengths[index]) for index in batch]
        rows = Rows.fresh([longest] * len(batch), [1.0] * len(batch))
        places = torch.cat([torch.arange(length) + longest * row for row, length in enumerate(lengths)])
        whole = torch.zeros(longest * len(batch), dtype=torch.long)
        wanted = torch.full_like(whole, IGNORED)
        whole[places], wanted[places] = ids, targets
        with attention_backend(attention):
            states = network.hidden(whole, rows)
        if everywhere:
            cross_entropy(network.lm_head(states).float(), wanted, ignore_index=IGNORED, reduction="sum").backward()
        else:
            head_loss(network.lm_head, states, wanted).backward()

    name = "padded to the longest of 8"
    ways: dict[str, Callable[[tuple[int, ...]], None]] = {
        "packed": packed,
        name: lambda batch: padded(batch, everywhere=False),
        f"{name}, logits everywhere": lambda batch: padded(batch, everywhere=True),
        f"{name}, logits everywhere, torch's attention": lambda batch: padded(batch, everywhere=True, attention="sdpa"),
    }
    eights = epoch_batches(samples, 0, seed=0, batch_size=8, budget=None)[:batches]
    chosen = [index for batch in eights for index in batch]
    full = in_order(samples.lengths, chosen, batch_size=8, budget=8 * 512)
    count = int(samples.lengths[chosen].sum())
    computed = sum(8 * int(samples.lengths[list(batch)].max()) for batch in eights)
    results: dict[str, Any] = {
        "samples": len(samples), "mean_length": float(samples.lengths.mean()), "tokens": count,
        "share of padding": 1 - count / computed,
    }  # fmt: skip
    parts = {name: full if name == "packed" else eights for name in ways}

    def seconds(name: str, batch: tuple[int, ...]) -> float:
        begun = time.perf_counter()
        ways[name](batch)
        taken = time.perf_counter() - begun
        for parameter in network.parameters():
            parameter.grad = None
        return taken

    for name, own in parts.items():  # the largest batch takes memory that later ones find
        seconds(name, max(own, key=lambda batch: len(batch) * int(samples.lengths[list(batch)].max())))
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, own in parts.items():
            times[name].append(sum(seconds(name, batch) for batch in own))
    for name, each in times.items():
        results[name] = count / statistics.median(each)
        results[f"{name}, each turn"] = [count / taken for taken in each]
    print(f"\n| {len(samples)} samples of {results['mean_length']:.0f} tokens, at most 512; {len(chosen)} of them in "
          f"batches of 8, of which {results['share of padding']:.0%} would be padding | real tokens/s |")  # fmt: skip
    print("|---|---|")
    for name in ways:
        print(f"| {name} | {results[name]:.0f} |")
    for name in list(ways)[1:]:
        results[f"packed / {name}"] = results["packed"] / results[name]
        print(f"| packed / {name} | {results[f'packed / {name}']:.2f} |")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    step = verbs.add_parser("step")
    step.add_argument("model", type=Path)
    step.add_argument("--turns", type=int, default=2)
    step.add_argument(
        "--sides", nargs="+", default=SIDES, choices=SIDES,
    )  # fmt: skip
    side = verbs.add_parser("side")
    side.add_argument("side")
    side.add_argument("model", type=Path)
    packing = verbs.add_parser("packed")
    packing.add_argument("model")
    packing.add_argument("data", type=Path)
    packing.add_argument("--batches", type=int, default=5, help="of eight samples")
    packing.add_argument("--turns", type=int, default=3)
    for each in (step, side):
        each.add_argument("--rounds", type=int, default=3)
    for each in (step, side, packing):
        each.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.verb == "side":
        if options.side == "peft":
            times = peft(options.model, options.rounds)
        else:
            kind, recompute = options.side.split(", ")
            times = ours(options.model, recompute, options.rounds, quant=kind == "qlora")
        print(json.dumps({"times": times, "peak_gb": peak_gb()}))
        return
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    about = {"torch": torch.__version__, "machine": platform.processor() or platform.machine(),
             "commit": commit.stdout.strip()}  # fmt: skip
    if options.verb == "step":
        results = step_table(options.model, options.rounds, options.turns, options.threads, options.sides)
    else:
        results = packed_table(options.model, options.data, options.batches, options.turns)
    print(json.dumps(about | {"results": results}))


if __name__ == "__main__":
    main()
