"""Plain values, as files and command lines hold them, made into what the fields of a dataclass declare."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from .ops.checks import nearest


def from_mapping(cls: type, values: dict[str, Any], where: str = "") -> Any:
    """A dataclass from a nested plain mapping, every key and type checked.

    A class that stands in mappings in another form than its fields has a classmethod `from_plain` for it.

    Raises:
        ValueError: for an unknown key (with the nearest valid one) or a value of another type.
    """
    hints = typing.get_type_hints(cls)
    fields = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in fields:
            raise ValueError(f"Unknown configuration key '{where}{key}'.{nearest(key, fields)}")
    return cls(**{key: _convert(hints[key], value, where + key) for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    if getattr(value, "ndim", None) == 0:  # a number of numpy or torch, which neither JSON nor YAML knows
        value = value.item()
    if dataclasses.is_dataclass(hint) and isinstance(value, dict | None):
        if from_plain := getattr(hint, "from_plain", None):
            return from_plain(value or {})
        return from_mapping(hint, value or {}, where + ".")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple and isinstance(value, list | tuple) and len(value) == len(arguments):
        return tuple(_convert(a, v, where) for a, v in zip(arguments, value, strict=True))
    if origin is list and isinstance(value, list | tuple):
        return [_convert(arguments[0], v, where) for v in value]
    if origin is dict and isinstance(value, dict):
        return dict(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():  # 1e6
        return int(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    if origin in (list, tuple):
        length = f" of {len(arguments)}" if origin is tuple else ""
        raise ValueError(f"Expected {where} as a list{length}, got {value!r}.")
    expected = "bool (true or false)" if hint is bool else getattr(hint, "__name__", str(hint))
    raise ValueError(f"Expected {where} of type {expected}, got {value!r}.")
