"""Other people's clients against tools, responses, messages and Ollama's calls, in an environment of their own."""

from __future__ import annotations

import ast
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.conftest import Server, running

ROOT = Path(__file__).parents[2]
NAMES = ("openai_tools", "anthropic", "ollama", "langchain")
SCRIPTS = [Path(__file__).parent / "clients" / f"with_{name}.py" for name in NAMES]
CHECKS = [
    (script.stem, node.name)
    for script in SCRIPTS
    for node in ast.parse(script.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]


@pytest.fixture(scope="module")
def keyed(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("QWENLET_DATA", str(tmp_path_factory.mktemp("data")))
        with running(demo_gguf, "--quiet", "--api-key", "sk-test") as server:
            yield server


@pytest.fixture(scope="module")
def outcomes(keyed: Server) -> dict[tuple[str, str], str]:
    """What went wrong in each check; nothing, it is hoped."""
    made = subprocess.run(["sh", ROOT / "scripts" / "clients"], capture_output=True, text=True, check=False)
    assert made.returncode == 0, f"scripts/clients made no environment: {made.stderr}"
    found = {}
    for script in SCRIPTS:
        command = [made.stdout.strip(), str(script), f"http://127.0.0.1:{keyed.port}", "sk-test"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == 0, done.stderr
        found |= {(script.stem, name): trouble for name, trouble in json.loads(done.stdout).items()}
    return found


@pytest.mark.parametrize(("script", "check"), CHECKS)
def test_a_client(outcomes: dict[tuple[str, str], str], script: str, check: str) -> None:
    assert not outcomes[script, check], outcomes[script, check]
