"""Other people's clients against a real server. scripts/clients makes their environment."""

from __future__ import annotations

import ast
import json
import subprocess
from pathlib import Path

import pytest

from server.conftest import running

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "clients" / "with_openai.py"
CHECKS = [
    node.name
    for node in ast.parse(SCRIPT.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]


@pytest.fixture(scope="module")
def outcomes(demo_gguf: Path) -> dict[str, str]:
    """What went wrong in each check; nothing, it is hoped."""
    made = subprocess.run(["sh", ROOT / "scripts" / "clients"], capture_output=True, text=True, check=False)
    assert made.returncode == 0, f"scripts/clients made no environment: {made.stderr}"
    with running(demo_gguf, "--quiet", "--api-key", "sk-test") as server:
        url = f"http://127.0.0.1:{server.port}/v1"
        command = [made.stdout.strip(), str(SCRIPT), url, "sk-test"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("check", CHECKS)
def test_openais_client(outcomes: dict[str, str], check: str) -> None:
    assert not outcomes[check], outcomes[check]
