"""results.json: a list of rows, each of which says all that its numbers depend on."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import write_atomically
from .perplexity import Perplexity
from .sparsity import Sparsity
from .tables import TextTable, text_table
from .throughput import Throughput

Row = dict[str, Any]

# Two rows that agree in these are the same measurement, and the newer one replaces the older.
KEY = ("evaluation", "model", "attention", "attention_options", "data", "cross_document", "tokenizer", "device")
KEY += ("dtype", "compile", "seq_len", "stride", "batch_size", "backward")

SETTINGS = {
    "model": "model",
    "attention": "attention",
    "attention_options": "options",
    "data": "data",
    "cross_document": "across documents",
    "tokenizer": "tokenizer",
    "device": "device",
    "dtype": "dtype",
    "compile": "compiled",
    "seq_len": "seq_len",
}
COLUMNS = {
    "perplexity": {
        "stride": "stride",
        "tokens": "tokens",
        "loss": "loss",
        "perplexity": "perplexity",
        "bits_per_byte": "bits/byte",
    },
    "sparsity": {
        "density": "density",
        "support": "keys per query",
        "largest_support": "at most",
        "tile_mode": "in tile mode",
    },
    "throughput": {
        "batch_size": "batch",
        "pass": "pass",
        "status": "status",
        "tokens_per_s": "tokens/s",
        "tokens_per_s_p20": "p20",
        "tokens_per_s_p80": "p80",
        "ms": "ms",
        "memory_gib": "peak GiB",
        "memory_kind": "peak GiB:",
    },
}
ALWAYS = ("attention", "seq_len", "loss", "perplexity", "bits_per_byte", "tokens_per_s", "ms", "memory_gib")
ALWAYS += ("density", "support", "largest_support")


def result_row(
    measured: Perplexity | Sparsity | Throughput,
    *,
    model: str,
    attention: str,
    tokenizer: str,
    device: str,
    dtype: str,
    **more: Any,
) -> Row:
    """A row of results.json: what was measured, on what, by which versions, when.

    Values that JSON does not know (a loss that is not finite) become None.

    Args:
        device: its name, as "NVIDIA H200".
        dtype: of the matrix products, as "bf16".
        more: what else the numbers depend on (attention_options, data, compile, ...), as JSON knows it.
    """
    row = {
        "evaluation": type(measured).__name__.lower(),
        "model": model,
        "attention": attention,
        "tokenizer": tokenizer,
        "device": device,
        "dtype": dtype,
        **more,
        **dataclasses.asdict(measured),
        "torch": importlib.metadata.version("torch"),
        "transformers": importlib.metadata.version("transformers"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return _plain(row)


def read_results(path: Path) -> list[Row]:
    """The rows of results.json; none where there is no such file.

    Raises:
        ValueError: if the file holds something else.
    """
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"'{path}' is not JSON ({error}); remove it and evaluate again.") from None
    needed = {"evaluation", "attention", "seq_len"}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and needed <= set(row) for row in rows):
        raise ValueError(f"Expected a list of evaluation rows in '{path}', got something else; remove it.")
    return rows


def merge_results(path: Path, rows: Sequence[Row]) -> list[Row]:
    """Adds rows to results.json, never leaving half a file; a row of the same measurement is replaced, others stay.

    Returns:
        All rows now in the file.

    Raises:
        ValueError: if the file holds something else.
    """
    merged = {_key(row): row for row in [*read_results(path), *rows]}
    text = json.dumps(list(merged.values()), indent=1, allow_nan=False) + "\n"
    write_atomically(path, text)
    return list(merged.values())


def result_tables(rows: Sequence[Row]) -> list[TextTable]:
    """One table for each kind of evaluation there is. A key "run" in the rows becomes their last column."""
    tables = []
    for kind, columns in COLUMNS.items():
        chosen = [_with_pass(row) for row in rows if row["evaluation"] == kind]
        if chosen:
            chosen.sort(key=lambda row: (row["seq_len"], row["attention"]))
            tables.append(text_table(kind.capitalize(), chosen, SETTINGS | columns | {"run": "run"}, ALWAYS))
    return tables


def _with_pass(row: Row) -> Row:
    return row | {"pass": "forward + backward" if row.get("backward") else "forward"}


def _key(row: Row) -> str:
    return json.dumps([row.get(name) for name in KEY], sort_keys=True)


def _plain(value: Any) -> Any:
    """As JSON will give it back."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
