"""A document of tables and plots, and its form in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qwenlet.evals.figures import Plot


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()


@dataclass(frozen=True)
class Report:
    title: str
    sections: Sequence[Section]

    def markdown(self) -> str:
        """Without the plots, which the page has."""
        parts = [f"# {self.title}"]
        for section in self.sections:
            parts.append(f"## {section.title}")
            parts += [section.text] if section.text else []
            parts += [_markdown_table(table) for table in section.tables]
        return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(table.head), line(["---"] * len(table.head)), *map(line, table.rows)])
