"""The profile where torch is nearly all there is, as on the machines that benchmarks/gpu.sh is for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# the stand-ins go before what is installed, so that the machine seems to have none of it
BARE = """
import sys
sys.meta_path.insert(0, sys.meta_path.pop())
import torch
from qwenlet.profiling.alone import _answer
torch.set_num_threads(1)
told = _answer({
    "subject": {"model": "random:tiny", "device": "cpu"}, "threads": 1,
    "job": {"kind": "generate", "precision": "int4", "attention": "own", "prompt": 1, "tokens": [4]},
})
import qwenlet.profiling.session
import gguf
assert type(gguf).__name__ == "_Stub", "the package itself was found"
print(told[0]["done"])
try:
    gguf.GGUFReader("some.gguf")
except ModuleNotFoundError as error:
    print(error)
"""


def test_a_profile_runs_without_the_packages_of_files_and_text():
    paths = os.pathsep.join([str(ROOT / "benchmarks" / "absent"), str(ROOT / "src")])
    found = subprocess.run(
        [sys.executable, "-c", BARE], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == ["4", "gguf is not installed here"]
