"""Fixtures shared by all tests. Two files are too large for the repository and come from scripts/fetch-test-data:
the Qwen vocabulary (2.6 MB) and the demo model (98 MB). A test that needs one asks for the fixture."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Kernels for a GPU run on CPU tensors here. Triton reads this when it is imported, by whichever test that is.
os.environ.setdefault("TRITON_INTERPRET", "1")

# a shared machine can stall any single example
settings.register_profile("qwenlet", deadline=None)
settings.load_profile("qwenlet")


@pytest.fixture(scope="session", autouse=True)
def folders_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is read from the user's cache or conversations, or left there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWENLET_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("QWENLET_DATA", str(tmp_path_factory.mktemp("data")))
        patch.delenv("QWENLET_NO_HISTORY", raising=False)
        yield


GOLDEN = Path(__file__).parent / "golden"
FILES = {
    "qwen.tiktoken": "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186",
    "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}


def _test_data(name: str) -> Path:
    folder = Path(os.environ.get("QWENLET_TEST_DATA", Path.home() / ".cache" / "qwenlet-test-data"))
    path = folder / name
    if not path.exists():
        pytest.fail(f"{path} is missing: run scripts/fetch-test-data, or set QWENLET_TEST_DATA to a folder that has it")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == FILES[name], f"{path} has sha256 {digest}, expected {FILES[name]}"
    return path


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of small reference outputs of the published code."""
    return GOLDEN


@pytest.fixture(scope="session")
def qwen_vocab() -> Path:
    return _test_data("qwen.tiktoken")


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    return _test_data("SmolLM2-135M-Instruct.Q4_1.gguf")
