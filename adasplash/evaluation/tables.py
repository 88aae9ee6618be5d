"""Tables of text, for a terminal and for Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

NOTHING = "–"


@dataclass(frozen=True)
class TextTable:
    """caption: what is the same in every row."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    def rich(self) -> Table:
        table = Table(title=self.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for heading, right in zip(self.headings, self._numeric(), strict=True):
            table.add_column(heading, justify="right" if right else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row))
        return table

    def markdown(self) -> str:
        rule = ["---:" if right else "---" for right in self._numeric()]
        cells = [[cell.replace("|", "\\|") for cell in row] for row in (self.headings, rule, *self.rows)]
        lines = ["| " + " | ".join(row) + " |" for row in cells]
        caption = [f"{self.caption}.", ""] if self.caption else []
        return "\n".join([f"## {self.title}", "", *caption, *lines, ""])

    def _numeric(self) -> list[bool]:
        columns = zip(*self.rows, strict=True) if self.rows else [()] * len(self.headings)
        return [all(cell[:1].isdigit() or cell[:1] in "-–" for cell in column) for column in columns]


def print_tables(tables: Sequence[TextTable]) -> None:
    """Prints each table at its natural width: a cell cut short in a narrow terminal would be worse than a long line."""
    for table in tables:
        drawn, console = table.rich(), Console()
        width = console.measure(drawn, options=console.options.update(width=10_000)).maximum
        console = Console(width=max(width, console.width))
        console.print(drawn)
        if table.caption:
            console.print(Text(f"{table.caption}\n", style="dim"))


def text_table(
    title: str, rows: Sequence[dict[str, Any]], columns: dict[str, str], always: Sequence[str] = ()
) -> TextTable:
    """A table that shows only what tells the rows apart.

    Args:
        columns: heading of each key, in order. What every row lacks is left out; what is the same in every row stands
            in the caption.
        always: keys that stay columns even so.
    """
    cells = {key: [readable(row.get(key)) for row in rows] for key in columns}
    cells = {key: column for key, column in cells.items() if set(column) != {NOTHING}}
    same = [key for key, column in cells.items() if len(set(column)) == 1 and key not in always]
    shown = [key for key in cells if key not in same]
    return TextTable(
        title,
        tuple(columns[key] for key in shown),
        tuple(zip(*(cells[key] for key in shown), strict=True)),
        ", ".join(f"{columns[key]} {cells[key][0]}" for key in same),
    )


def readable(value: Any) -> str:
    """Whole and large numbers with separators, others with four digits, options as key=value; a dash for None and no options."""
    if value is None or value == {}:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return " ".join(f"{key}={f'{part:g}' if isinstance(part, float) else part}" for key, part in value.items())
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value) and abs(value) >= 1000):
        return f"{value:,.0f}"
    return f"{value:#.4g}" if isinstance(value, float) else str(value)
