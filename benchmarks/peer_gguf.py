"""The same weights as a GGUF file for llama.cpp: architecture `qwen`, float16.

    python benchmarks/peer_gguf.py MODEL OUT.gguf      MODEL: a folder with Qwen-1 weights, as `qwenlet random` writes

`llama-quantize OUT.gguf Q4_0.gguf Q4_0` makes the quantized ones. llama.cpp wants a vocabulary even where only speed is
measured; a folder without one gets placeholders.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwenlet.checkpoint import convert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    convert(args.model, args.out, to="gguf", dtype="fp16", architecture="qwen", placeholders=True)


if __name__ == "__main__":
    main()
