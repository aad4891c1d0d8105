"""Does llama.cpp compute from the GGUF files we write what we compute from their source? Tokens and logits of a text.

    python benchmarks/peer_logits.py DIR MODEL text.txt --dtype fp16       DIR: as benchmarks/peer_llama.sh makes it

The model is converted, llama-perplexity reads the text and saves its token ids and log-probabilities (16 bits each,
over the 16 nats below the best, so agreement ends near 2e-4), and they are compared with ours in float32: whether the
ids are equal, KL divergence and top-1 agreement over the second half of each window. The last line is one JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

import qwenlet
from qwenlet import hub
from qwenlet.checkpoint import convert


class Saved:
    """What llama-perplexity saved: ids [windows, size], and log-probabilities of one window at a time."""

    def __init__(self, path: Path) -> None:
        head = np.fromfile(path, np.uint8, 20)
        assert head[:8].tobytes() == b"_logits_", f"{path} is no file of llama-perplexity's logits"
        self.size, self.vocabulary, self.windows = (int(n) for n in head[8:].view(np.int32))
        self.ids = np.fromfile(path, np.int32, self.windows * self.size, offset=20).reshape(self.windows, self.size)
        self.scored = self.size - 1 - self.size // 2
        row = 2 * ((self.vocabulary + 1) // 2) + 4  # scale and minimum, two floats, then a code for each token
        rows = (self.windows, self.scored, row)
        self.codes = np.memmap(path, np.uint16, "r", offset=20 + self.ids.nbytes, shape=rows)

    def logprobs(self, window: int) -> torch.Tensor:
        """[scored, V] float32, of the positions size // 2 to size - 2."""
        rows = np.array(self.codes[window])
        scale, minimum = rows[:, :4].copy().view(np.float32).T
        codes = torch.from_numpy(rows[:, 4 : 4 + self.vocabulary].astype(np.float32))
        return codes * torch.from_numpy(scale.copy())[:, None] + torch.from_numpy(minimum.copy())[:, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--dtype", default="fp16")
    parser.add_argument("--architecture", choices=("qwen", "qwen2"))
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    source = hub.resolve(args.model)
    with tempfile.TemporaryDirectory() as name:
        file, base = Path(name) / "model.gguf", Path(name) / "base.dat"
        convert(source, file, to="gguf", dtype=args.dtype, architecture=args.architecture)
        measure = ["-f", args.text, "-c", args.window, "--chunks", args.windows, "-t", args.threads]
        command = [args.folder / "llama-perplexity", "-m", file, *measure, "--kl-divergence-base", base]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        file.unlink()
        saved = Saved(base)
        divergences, agreements, largest = [], [], 0.0
        with qwenlet.load(str(source), device="cpu", dtype="fp32", quant="none") as llm, torch.inference_mode():
            ours = llm.tokenizer.encode(args.text.read_text(encoding="utf-8"))
            ids_equal = bool((saved.ids.ravel() == np.array(ours[: saved.ids.size])).all())
            for window in range(saved.windows):
                logits = llm.logits(saved.ids[window].tolist())[saved.size // 2 : -1].float()
                mine, theirs = logits.log_softmax(-1), saved.logprobs(window)
                seen = mine > mine.max(-1, keepdim=True).values - 15.5  # below, theirs are cut off
                divergences.append((mine.exp() * (mine - theirs))[seen].sum() / len(mine))
                agreements.append((mine.argmax(-1) == theirs.argmax(-1)).float().mean())
                largest = max(largest, float((mine - theirs)[seen].abs().max()))
    result = {
        "benchmark": "peer_logits",
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "architecture": args.architecture,
        "positions": saved.windows * saved.scored,
        "ids_equal": ids_equal,
        "kl": float(torch.stack(divergences).mean()),
        "top1": float(torch.stack(agreements).mean()),
        "largest_logprob_error": largest,
    }
    print(
        f"{result['model']} {args.dtype}: ids {'equal' if ids_equal else 'DIFFER'}, {result['positions']} positions, "
        f"KL {result['kl']:.2g}, top-1 {result['top1']:.1%}, largest log-probability error {largest:.2g}"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
