"""The reference pages are what the code says."""

from __future__ import annotations

import importlib.util
from importlib.machinery import SourceFileLoader
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_reference_pages_are_fresh() -> None:
    loader = SourceFileLoader("scripts_docs", str(ROOT / "scripts" / "docs"))
    spec = importlib.util.spec_from_loader("scripts_docs", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    assert module.TARGET.read_text(encoding="utf-8") == module.page(), "run: .venv/bin/python scripts/docs"
    assert module.SERVER.read_text(encoding="utf-8") == module.server_page(), "run: .venv/bin/python scripts/docs"
