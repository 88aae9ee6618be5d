"""The jobs of one command line: in a sweep the others go on where one fails, and its end says what became of each."""

from __future__ import annotations

import errno
import sys
import traceback
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .loop import TrainingDiverged
from .run_folder import ROOT


def expected(error: Exception) -> str:
    """What a program ends with for an error that was to be expected; raises any other."""
    match error:
        case ValueError():
            return f"Error: {error}"
        case TrainingDiverged():
            return f"TrainingDiverged: {error}"
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            where = f" for '{error.filename}'" if error.filename else ""
            return f"Error: {error.strerror}{where}; make room and start again. What was saved before is whole."
    raise error


class Jobs:
    """What becomes of each job.

    Args:
        program: as "train.py".
        logs: how the names of the files begin that a sweep leaves for jobs that failed.
    """

    def __init__(self, program: str, logs: str):
        self.program, self.logs = program, logs
        self.outcomes: list[tuple[str, str, str | Path]] = []  # (job, what became of it, where to look)

    def run(
        self, work: Callable[[], dict[str, Any]], overrides: Sequence[str], *, sweep: bool
    ) -> dict[str, Any] | None:
        """What `work` returns, its "status" and "run_dir" noted; None where it failed and the sweep goes on.

        A single job that fails ends the program, with one sentence where the error was to be expected.
        """
        job = " ".join(word.removeprefix("++") for word in overrides)
        log = ROOT / f"{self.logs}-{zlib.crc32(job.encode()):08x}.txt"
        if sweep:
            print(f"\n--- {job}", flush=True)
        try:
            summary = work()
        except Exception as error:
            if not sweep:
                sys.exit(expected(error))
            log.parent.mkdir(exist_ok=True)
            log.write_text(f"python {self.program} {job}\n\n{traceback.format_exc()}")
            print(f"Failed: {error}", flush=True)
            self.outcomes.append((job, "failed", log))
            return None
        self.outcomes.append((job, summary["status"], summary["run_dir"]))
        log.unlink(missing_ok=True)
        return summary

    def report(self) -> bool:
        """Prints what became of several jobs; whether one failed."""
        failed = any(status == "failed" for _, status, _ in self.outcomes)
        if len(self.outcomes) > 1 or failed:
            print("\nSweep:")
            for job, status, where in self.outcomes:
                print(f"  {status:9s} {job}  ->  {where}")
        return failed
