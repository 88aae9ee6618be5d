"""What a measurement must name to mean anything: the machine, the versions, the commit and the command."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path


def read_facts(script: str, arguments: Sequence[str]) -> dict[str, str | None]:
    """device, torch, triton, commit (of the package that is measured) and command, as the columns of a row.

    Needs a GPU and triton.
    """
    import torch
    import triton

    import adasplash

    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": read_commit(Path(adasplash.__file__).parent),
        "command": shlex.join([script, *arguments]),
    }


def read_commit(folder: Path) -> str | None:
    """The commit that a folder is at, as "1a2b3c4", with "-dirty" where tracked files have changed; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # there is no git
        return None


def facts_line(facts: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())
