"""Does a Qwen made from nothing learn more than counts do, and what are NTK and log-n attention for?

A quarter of an hour of `qwenlet pretrain`: 6 layers of 256, 4,096 tokens of the published vocabulary, embedding and
head in one table, 256 tokens at a time. Each file is one text, whose last 3 % (from an empty line on) are held out.
Then `qwenlet eval length` on what was held out: perplexity at 1/2, 1, 2, 4 and 8 times the length that training saw,
and what each switch changes, window by window. Last how widely attention is spread at these lengths: its entropy.

    python benchmarks/tiny_qwen.py stories.txt plays.txt --tokenizer qwen.tiktoken --out OUT --threads 1

An interrupted run goes on where it stopped when the same command is given again. OUT/model has the checkpoint and in
OUT/model/training the log, loss.png and report.json; OUT/length-NAME has the evaluation of each file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import fill
from typing import Any

import torch

from qwenlet.checkpoint import Checkpoint, load_model
from qwenlet.evals.attention import attention_entropy
from qwenlet.evals.tasks.length import MULTIPLES, SWITCHES
from qwenlet.tokenizer import Tokenizer

HELD_OUT = 0.03
LENGTH = 256
ENTROPY_WINDOWS = 8  # of each length
SHAPE = ["--vocabulary", "4096", "--layers", "6", "--hidden", "256", "--heads", "4", "--inner", "688", "--tied"]
RUN = ["--epochs", "2", "--batch-size", "8", "--accumulation", "1", "--lr", "2e-3", "--min-lr", "0.05",
       "--eval-every", "420"]  # fmt: skip


def split(file: Path, folder: Path) -> tuple[Path, Path]:
    """(to learn, held out), written into a folder."""
    text = file.read_text(encoding="utf-8")
    at = text.find("\n\n", int(len(text) * (1 - HELD_OUT)))
    if at < 0:
        sys.exit(f"{file} has no empty line in its last {HELD_OUT:.0%}; expected a text of paragraphs")
    parts = (folder / f"{file.stem}.txt", folder / f"{file.stem}-held-out.txt")
    for path, part in zip(parts, (text[:at], text[at + 2 :]), strict=True):
        path.write_text(part, encoding="utf-8")
    return parts


def qwenlet(*arguments: str, threads: int) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, "-m", "qwenlet", *arguments], check=True, env=environment)


def print_training(report: dict[str, Any]) -> None:
    print(f"\n| nats a token, over {report['tokens'][1]:,} tokens that were held out | |")
    print("|---|---|")
    for order, loss in report["baselines"].items():
        counts = "single tokens" if order == "1" else f"{order}-grams, interpolated (Witten and Bell)"
        print(f"| counts of {counts} | {loss:.3f} |")
    print(f"| the model | {report['held_out']:.3f} |")
    print(f"\nIts sample:\n\n{report['sample']}\n\nStands in what it learned: {report['overlap']!r}, "
          f"{len(report['overlap'])} of {len(report['sample'])} characters.")  # fmt: skip


def print_lengths(name: str, outcome: dict[str, Any]) -> None:
    """A row per switch, a column per length, as in the published table."""
    (curves, *_) = outcome["plots"]
    print(f"\n| {name}, perplexity | " + " | ".join(f"{size:,} tokens" for size in curves["x"]) + " |")
    print("|---" * (len(curves["x"]) + 1) + "|")
    for switches, values in curves["curves"]:
        print(f"| {switches} | " + " | ".join(f"{value:.2f}" for value in values) + " |")


def print_changes(name: str, outcome: dict[str, Any]) -> None:
    """A row per switch, a column per length: what it adds to the perplexity, with the error of paired windows."""
    cells: dict[str, dict[str, str]] = {}
    for figure in outcome["figures"]:
        at, comma, change = figure["name"].partition(", change by ")
        if comma:
            error = "" if figure["error"] is None else f" ± {figure['error']:.2f}"
            cells.setdefault(change.removesuffix(" in %"), {})[at] = f"{figure['value']:+.2f}{error}"
    lengths = sorted({at for row in cells.values() for at in row}, key=lambda at: int(at.split()[0]))
    print(f"\n| {name}, % of perplexity | " + " | ".join(lengths) + " |")
    print("|---" * (len(lengths) + 1) + "|")
    for change, row in cells.items():
        print(f"| {change} | " + " | ".join(row.get(at, "") for at in lengths) + " |")


def entropies(folder: Path, text: Path) -> dict[str, dict[int, float]]:
    """By switches and length: nats of attention's entropy in the last quarter of windows, mean of all heads."""
    model, _ = load_model(Checkpoint.open(folder), torch.float32, torch.device("cpu"))
    ids = Tokenizer.from_folder(folder).encode(text.read_text(encoding="utf-8"), allowed_special=set())
    found: dict[str, dict[int, float]] = {}
    for size in (int(LENGTH * multiple) for multiple in MULTIPLES):
        windows = [ids[begin:][:size] for begin in range(0, len(ids) // size * size, size)][:ENTROPY_WINDOWS]
        for name, (ntk, logn) in SWITCHES.items():
            spread = [attention_entropy(model, window, ntk=ntk, logn=logn)[..., -size // 4 :] for window in windows]
            found.setdefault(name, {})[size] = torch.stack(spread).mean().item()
    return found


def print_entropies(name: str, found: dict[str, dict[int, float]]) -> None:
    sizes = list(next(iter(found.values())))
    print(f"\n| {name}, nats of attention | " + " | ".join(f"{size:,} tokens" for size in sizes) + " |")
    print("|---" * (len(sizes) + 1) + "|")
    for switches, row in found.items():
        print(f"| {switches} | " + " | ".join(f"{value:.3f}" for value in row.values()) + " |")


def draw(outcome: dict[str, Any], path: Path) -> None:
    """The evaluation's curves as PNG: by length, and in the longest windows by position."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, plot in zip(figure.subplots(1, len(outcome["plots"]), squeeze=False)[0], outcome["plots"], strict=True):
        for name, values in plot["curves"]:
            axes.plot(plot["x"], values, marker="o" if plot["x_name"] == "tokens" else None, label=name)
        axes.set(title=fill(plot["title"], 60), xlabel=plot["x_name"], ylabel=plot["y_name"])
        axes.set_yscale("log" if plot["logarithmic"] else "linear")
        axes.axvline(LENGTH, color="grey", linestyle=":", label="training length")
        axes.title.set_size("small")
        axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="texts, UTF-8")
    parser.add_argument("--tokenizer", required=True, help="qwen.tiktoken")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", default="once upon a time")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    parts = [split(file, options.out) for file in options.files]
    model = options.out / "model"
    if not (model / "config.json").exists():
        held_out = [word for _, path in parts for word in ("--eval-data", str(path))]
        qwenlet(
            "pretrain", *(str(path) for path, _ in parts), *held_out, "--out", str(model), "--tokenizer",
            options.tokenizer, "--length", str(LENGTH), *SHAPE, *RUN, "--prompt", options.prompt,
            threads=options.threads,
        )  # fmt: skip
    training = json.loads((model / "training" / "report.json").read_text())
    print_training(training)
    runs = {}
    for _, apart in parts:
        run = options.out / f"length-{apart.stem.removesuffix('-held-out')}"
        qwenlet(
            "eval", f"length:{apart.resolve()}", "--model", str(model), "--data-dir", str(options.out), "--out",
            str(run), "--max-context", str(8 * LENGTH), "--precisions", "fp32", threads=options.threads,
        )  # fmt: skip
        (outcome,) = json.loads((run / "results.json").read_text())["outcomes"]
        runs[apart.stem] = outcome["summary"]
        draw(runs[apart.stem], run / "length.png")
    torch.set_num_threads(options.threads)
    spread = {held_out.stem: entropies(model, held_out) for _, held_out in parts}
    for name, outcome in runs.items():
        print_lengths(name, outcome)
        print_changes(name, outcome)
        print_entropies(name, spread[name])
    del training["outcome"]["losses"]
    figures = {name: run["figures"] for name, run in runs.items()}
    print(json.dumps({"training": training, "length": figures, "entropy": spread}))


if __name__ == "__main__":
    main()
