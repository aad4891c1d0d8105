"""What do four and eight bits cost on real weights? Ours through the kernels users get, and llama.cpp's Q4_0 beside it.

The demo model (its linears lie on a 4-bit grid of groups of 32 with minimums, so ours are symmetric groups of 64), on
windows of 512 tokens of a text file, second half scored, as llama-perplexity does. KL divergence is against the same
model in float32 for ours, and against llama.cpp's own run of the original file for Q4_0. "int4" is what quant="int4"
does, round to nearest with errors weighed by a short text; "unweighted" is the same without that.

    python benchmarks/quality.py DIR wiki.test.raw --windows 40       DIR: as benchmarks/peer_llama.sh makes it

The calibration text of GPTQ is the built-in one, not the text measured here. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import qwenlet
from qwenlet import hub, scoring

WINDOW = 512


def peer(folder: Path, original: Path, text: Path, windows: int, threads: int, work: Path) -> dict[str, float]:
    """Mean KL divergence and perplexity of Q4_0 made of the original file."""
    small, base = work / "q4_0.gguf", work / "base.dat"
    quiet: dict[str, Any] = {"check": True, "capture_output": True, "text": True}
    subprocess.run([folder / "llama-quantize", "--allow-requantize", original, small, "Q4_0", str(threads)], **quiet)
    measure: list[Any] = ["-f", text, "--chunks", str(windows), "-c", str(WINDOW), "-t", str(threads)]
    command = [folder / "llama-perplexity", *measure, "--kl-divergence-base", base]
    first = subprocess.run([*command, "-m", original], **quiet)
    second = subprocess.run([*command, "-m", small, "--kl-divergence"], **quiet)
    plain = re.search(r"Final estimate: PPL = ([0-9.]+)", first.stdout + first.stderr)
    mean = re.search(r"Mean +KLD: +([0-9.]+)", second.stdout + second.stderr)
    quantized = re.search(r"Mean PPL\(Q\) +: +([0-9.]+)", second.stdout + second.stderr)
    assert plain is not None, "llama-perplexity printed no perplexity"
    assert mean is not None, "llama-perplexity printed no divergence"
    return {
        "original": float(plain[1]),
        "perplexity": float(quantized[1]) if quantized else float("nan"),
        "kl": float(mean[1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    original = hub.resolve("demo")
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        results["llama.cpp Q4_0"] = peer(args.folder, original, args.text, args.windows, args.threads, work)
        made = {}
        ways = {
            "int4, GPTQ": ["--method", "gptq"],
            "int4": ["--method", "rtn"],
            "int4, unweighted": ["--method", "rtn", "--no-weighted"],
        }
        for label, words in ways.items():
            made[label] = work / label.replace(", ", "-")
            subprocess.run(
                [sys.executable, "-m", "qwenlet", "quantize", "demo", made[label], "--bits", "4", *words],
                check=True,
                capture_output=True,
            )
        reference = qwenlet.load("demo", device="cpu", dtype="fp32")
        ids = reference.tokenizer.encode(args.text.read_text(encoding="utf-8"), allowed_special=set())
        pieces = scoring.windows(ids, WINDOW, args.windows)
        candidates: dict[str, dict[str, Any]] = {
            "int8": {"quant": "int8"},
            **{label: {"name_or_path": str(path)} for label, path in made.items()},
        }
        for label, options in candidates.items():
            with qwenlet.load(**({"name_or_path": "demo", "device": "cpu"} | options)) as quantized:
                found = scoring.compare(reference.logits, quantized.logits, pieces)
            results[label] = {
                "original": found.reference.value,
                "perplexity": found.other.value,
                "kl": found.divergence.mean,
                "top1": found.top1_agreement,
            }
    for label, result in results.items():
        change = result["perplexity"] / result["original"] - 1
        print(f"{label:24} perplexity {result['perplexity']:7.3f} ({change:+.2%})  KL {result['kl']:.4f}")
    print(json.dumps({"windows": args.windows, "results": results}))


if __name__ == "__main__":
    main()
