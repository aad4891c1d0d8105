"""Does a Qwen made from nothing learn more than counts do, and what are NTK and log-n attention for?

Some minutes of `qwenlet pretrain`: 6 layers of 256, 4,096 tokens of the published vocabulary, embedding and head in one
table, 256 tokens at a time. Each file is one text, whose last 3 % (from an empty line on) are held out. Then `qwenlet
eval length` on what was held out: perplexity at 1/2, 1, 2, 4 and 8 times the length that training saw.

    python benchmarks/tiny_qwen.py stories.txt plays.txt --tokenizer qwen.tiktoken --out OUT --threads 2

An interrupted run goes on where it stopped when the same command is given again. OUT/model has the checkpoint and in
OUT/model/training the log, loss.png and report.json; OUT/length-NAME has the evaluation of each file.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HELD_OUT = 0.03
LENGTH = 256
SHAPE = ["--vocabulary", "4096", "--layers", "6", "--hidden", "256", "--heads", "4", "--inner", "688", "--tied"]
RUN = ["--epochs", "3", "--batch-size", "8", "--accumulation", "1", "--lr", "2e-3", "--min-lr", "0.05",
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


if __name__ == "__main__":
    main()
