"""How inputs and implementations are written on the command line: KIND or KIND:VALUES, told in help and errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Form(NamedTuple):
    """text: as "clustered:TOPICS"; condition: on its values, "" where it has none; summary: what it is."""

    text: str
    summary: str
    condition: str = ""

    def with_condition(self) -> str:
        return f"{self.text} with {self.condition}" if self.condition else self.text


def help_text(heading: str, forms: Mapping[str, Form]) -> str:
    """Lines for --help, one for each form."""
    width = max(len(form.text) for form in forms.values()) + 2
    lines = [
        f"  {form.text:{width}}{form.summary}" + (f"; {form.condition}" if form.condition else "")
        for form in forms.values()
    ]
    return "\n".join([f"{heading}:", *lines])


def misfit(what: str, text: str, forms: Mapping[str, Form]) -> ValueError:
    """The error for a text that is none of the forms (by kind): names the form of its kind, or all and the nearest kind."""
    kind = text.partition(":")[0]
    if kind in forms:
        return ValueError(f"Expected {forms[kind].with_condition()}, got '{text}'.")
    from adasplash.ops.checks import (
        nearest,
    )  # here: bench_attention.py has a process where adasplash is another package

    valid = ", ".join(form.text for form in forms.values())
    return ValueError(f"Unknown {what} '{text}'; expected one of {valid}.{nearest(kind, forms)}")
