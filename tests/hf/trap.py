"""Code in a checkpoint that leaves a mark when it runs."""

from __future__ import annotations

from pathlib import Path

MARKED = "configuration_qwen modeling_qwen tokenization_qwen qwen_generation_utils custom_generate/generate".split()


def trap(folder: Path) -> Path:
    """Puts code into a checkpoint that leaves a file behind when it runs."""
    (folder / "custom_generate").mkdir(exist_ok=True)
    for name in MARKED:
        (folder / f"{name}.py").write_text(f"open({str(folder / 'RAN')!r}, 'w').close()\nraise SystemExit(1)\n")
    return folder
