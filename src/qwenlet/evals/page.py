"""The report as one HTML page that needs nothing else: tables, and plots drawn inline (see plots)."""

from __future__ import annotations

import re
from html import escape

from qwenlet.evals.document import Report, Section, Table
from qwenlet.evals.plots import svg

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --faint: #6b7280; --line: #d8dbe0; --ours: #615ced;
  --theirs: #b9bec7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e7ea; --paper: #16181c; --faint: #9aa0aa; --line: #363a42;
  --ours: #8f8bff; --theirs: #565c67; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 64rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 0.8rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.25rem 0.9rem 0.25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { color: var(--faint); font-weight: 600; }
figure { margin: 1rem 0; } svg { max-width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 12px; }
"""


def html(report: Report) -> str:
    body = "\n".join(_section(section) for section in report.sections)
    title = escape(report.title)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    parts = [f"<section>\n<h2>{escape(section.title)}</h2>"]
    parts += [_text(section.text)] if section.text else []
    parts += [_table(table) for table in section.tables]
    parts += [f"<figure>{svg(plot)}</figure>" for plot in section.plots]
    return "\n".join([*parts, "</section>"])


def _text(text: str) -> str:
    """A paragraph, or a list where every line is an item."""
    lines = text.split("\n")
    if all(line.startswith("* ") for line in lines):
        return "<ul>" + "".join(f"<li>{_inline(line[2:])}</li>" for line in lines) + "</ul>"
    return f"<p>{_inline(text)}</p>"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_inline(cell)}</th>' for cell in table.head)
    rows = "".join("<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>\n" for row in table.rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>'


def _inline(text: str) -> str:
    """Escaped, with the two marks our own texts use: `code` and **strong**. A figure and its error stay on one line."""
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text).replace(" ± ", "\u00a0±\u00a0"))
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", marked)
