"""The rows that a benchmark leaves in a file, one a line, for those who draw them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_rows(path: Path, script: str, use: Callable[[Row], Any]) -> list[Row]:
    """All rows of a file.

    Args:
        script: that writes such rows.
        use: looks into a row as the caller will; what is no row makes it raise KeyError or TypeError.

    Raises:
        ValueError: for a file that is not there, or a line that is no row.
    """
    if not path.is_file():
        came = f"the folder '{path}'" if path.is_dir() else f"'{path}', which is not there"
        raise ValueError(f"Expected the file of rows that {script} writes, rows.jsonl, got {came}.")
    rows = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            rows.append(json.loads(line))
            use(rows[-1])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"Expected a row of {script} in each line of {path}, line {number} is none.") from None
    return rows
