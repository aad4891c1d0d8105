"""Other people's clients against a real server, in an environment of their own. scripts/clients makes it."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwenlet.config import SamplingParams
from server.conftest import Server, running
from server.scripted import saying

ROOT = Path(__file__).parents[2]
NAMES = ("openai", "openai_tools", "anthropic", "ollama", "langchain", "schemathesis")
SCRIPTS = [Path(__file__).parent / "clients" / f"with_{name}.py" for name in NAMES]
CHECKS = [
    (script.stem, node.name)
    for script in SCRIPTS
    for node in ast.parse(script.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]
SHORT = {"with_schemathesis"}  # bodies that say no length: the context is small, and so are the replies


@pytest.fixture(scope="module")
def environment() -> Path:
    """Its Python."""
    made = subprocess.run(["sh", ROOT / "scripts" / "clients"], capture_output=True, text=True, check=False)
    assert made.returncode == 0, f"scripts/clients made no environment: {made.stderr}"
    return Path(made.stdout.strip())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as variables:
        variables.setenv("QWENLET_DATA", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture(scope="module")
def keyed(demo_gguf: Path, data: None) -> Iterator[Server]:
    with running(demo_gguf, "--quiet", "--api-key", "sk-test") as server:
        yield server


@pytest.fixture(scope="module")
def short(demo_gguf: Path, data: None) -> Iterator[Server]:
    options = "--quiet --api-key sk-test --max-context 64 --request-timeout 60"
    with running(demo_gguf, *options.split()) as server:
        yield server


@pytest.fixture(scope="module")
def outcomes(environment: Path, keyed: Server, short: Server) -> dict[tuple[str, str], str]:
    """What went wrong in each check; nothing, it is hoped."""
    found = {}
    for script in SCRIPTS:
        server = short if script.stem in SHORT else keyed
        command = [str(environment), str(script), f"http://127.0.0.1:{server.port}", "sk-test"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=270)
        assert done.returncode == 0, done.stderr
        found |= {(script.stem, name): trouble for name, trouble in json.loads(done.stdout).items()}
    return found


@pytest.mark.parametrize(("script", "check"), CHECKS)
def test_a_client(outcomes: dict[tuple[str, str], str], script: str, check: str) -> None:
    assert not outcomes[script, check], outcomes[script, check]


@pytest.mark.skipif(shutil.which("node") is None, reason="compatcanary is a program of Node's, which is not installed")
def test_compatcanary(environment: Path) -> None:
    """Its modern profile. It names no length of its replies, and wants them to end: the model's words are scripted."""

    def says(params: SamplingParams) -> str:
        if params.lark is not None:  # the call that is forced
            return 'Action: compatcanary_echo\nAction Input: {"value": "CANARY_OK"}'
        return '{"status": "ok"}' if params.json_schema is not None else "CANARY_OK"

    canary = environment.parents[1] / "node_modules" / ".bin" / "compatcanary"
    if not canary.exists():
        pytest.skip("npm could not fetch compatcanary")
    with saying(says) as scripted:
        command = [str(canary), "scan", "--base-url", f"http://127.0.0.1:{scripted.server.port}/v1", "--model", "demo"]
        command += ["--profile", "modern", "--format", "json", "--timeout", "120"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=290)
    report = json.loads(done.stdout)
    assert [(one["id"], one["summary"]) for one in report["results"] if one["status"] != "pass"] == []
    assert report["summary"]["total"] >= 7
