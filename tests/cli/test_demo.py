"""The whole way with a real model: it knows the capital of France."""

from __future__ import annotations

import os
import subprocess
import sys


def test_the_demo_model_answers(demo_gguf):
    command = [sys.executable, "-m", "qwenlet", "chat", str(demo_gguf), "--max-new-tokens", "20", "--temperature", "0"]
    question = "What is the capital of France?"
    done = subprocess.run(
        [*command, "-p", question],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # threads that wait for each other stall on a busy machine
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert done.stderr == ""
