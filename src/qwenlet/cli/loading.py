"""A model for a verb to use: loaded behind a line of progress, and what of it runs worse than it could said once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qwenlet.cli import console

if TYPE_CHECKING:
    from qwenlet.llm import LLM


def load(model: str, *, quiet: bool = False, line: console.Progress | None = None, **options: Any) -> LLM:
    """`qwenlet.load` with these options. Its warnings go to stderr, unless `quiet`.

    Args:
        line: of progress, for who has to close it before the load has ended.
    """
    from qwenlet import api  # only now, because it takes seconds

    with line or console.Progress() as progress:
        llm = api.load(model, progress=progress.update, **options)
    if not quiet:
        for warning in llm.load_report.warnings:
            console.note(warning)
    return llm
