"""Times attention, forward and backward, beside its peers: a table, JSON rows and pictures. Needs an NVIDIA GPU.

    python scripts/bench_attention.py
    python scripts/bench_attention.py --lengths 16384 --inputs scattered:.2:.8 --implementations adasplash,fa2
    python scripts/bench_attention.py --implementations adasplash,fa4,adasplash2 --adasplash2 FOLDER
    python scripts/bench_attention.py --implementations softmax,fa2,fa4 --documents 8

All have the same inputs, causal, bfloat16, and each is first compared with a float64 computation, on the very input that
is timed: no time stands beside a wrong result. What does not depend on the input is timed once a length. With
--documents the texts are packed with that many documents each, which do not see each other; fa2 and fa4 are then the
kernels for sequences of different lengths. MiB is the memory that forward and backward take on top of q, k and v,
output and gradients included.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from attention_inputs import (
    INPUTS,
    InputSpec,
    draw_documents,
    entmax_threshold,
    make_inputs,
    number,
    parse_input,
    sparsity,
)
from attention_peers import (
    CHECKED_HEADS,
    CHECKED_QUERIES,
    PEERS,
    Call,
    Implementation,
    alpha_of,
    one_line,
    parse_implementation,
    prepare,
    why_left_out,
)
from facts import facts_line, read_facts
from forms import help_text
from torch import Tensor

# adasplash, and attention_pictures with it, is imported where it is used: attention_peers.py says why.

Row = dict[str, Any]

STANDARD_INPUTS = "scattered:.2:.8,scattered:.3:.6,clustered:3,clustered:8,clustered:32,gaussian"
STANDARD_IMPLEMENTATIONS = "adasplash,softmax,hash_sparse:16,qk_sparse:.5,fa2,cudnn,flex,fa4,adasplash2"

LARGEST_ERROR = 2e-2

# ---------------------------------------------------------------------------------------------------------- correctness


def reference(
    q: Tensor, k: Tensor, v: Tensor, out_gradient: Tensor, alpha: float, allowed: Tensor | None = None
) -> dict[str, Tensor]:
    """Causal attention of the last queries and its gradients, in float64.

    Args:
        q, out_gradient: (heads, queries, D), of the last queries of the text; k, v: (heads, keys, D).
        alpha: 1 is softmax, up to 2 entmax.
        allowed: bool (heads, queries, keys), besides the causal rule; with alpha 1 only.
    """
    q, k, v, out_gradient = (x.detach().double() for x in (q, k, v, out_gradient))
    queries, keys, scale = q.shape[1], k.shape[1], 1 / math.sqrt(q.shape[-1])
    place = torch.arange(keys, device=q.device)
    visible = place <= place[-queries:, None]
    visible = visible if allowed is None else visible & allowed
    scores = (scale * q @ k.mT).masked_fill(~visible, -math.inf)
    if alpha == 1:
        p = scores.softmax(-1).nan_to_num(0.0)  # a query that sees no key
    else:
        x = (alpha - 1) * scores
        p = (x - entmax_threshold(x, alpha, steps=60)).clamp(min=0) ** (1 / (alpha - 1))
    slope = torch.where(p > 0, p ** (2 - alpha), 0.0)
    p_gradient = out_gradient @ v.mT
    mean = (slope * p_gradient).sum(-1, keepdim=True) / slope.sum(-1, keepdim=True).clamp(min=1e-300)
    scores_gradient = slope * (p_gradient - mean)
    return {
        "out": p @ v,
        "dq": scale * scores_gradient @ k,
        "dk": scale * scores_gradient.mT @ q,
        "dv": p.mT @ out_gradient,
    }


def errors(call: Call, q: Tensor, k: Tensor, v: Tensor, out_gradient: Tensor, alpha: float) -> dict[str, float]:
    """The relative errors of the output and of the gradients, from the last queries of two heads of the first sample."""
    heads, last = slice(CHECKED_HEADS), slice(-CHECKED_QUERIES, None)
    from_checked = torch.zeros_like(out_gradient)
    from_checked[0, heads, last] = out_gradient[0, heads, last]
    out = call.attend()
    out.backward(from_checked)
    found = {
        "out": out[0, heads, last],
        "dq": q.grad[0, heads, last],
        "dk": k.grad[0, heads],
        "dv": v.grad[0, heads],
    }
    checked = (q[0, heads, last], k[0, heads], v[0, heads], out_gradient[0, heads, last])
    expected = reference(*checked, alpha, call.allowed)
    clear_gradients((q, k, v, *call.learned))
    return {name: ((found[name].double() - right).norm() / right.norm()).item() for name, right in expected.items()}


def what_is_wrong(found: dict[str, float]) -> str | None:
    """None for errors that rounding explains; NaN is wrong."""
    wrong = {name: error for name, error in found.items() if not error <= LARGEST_ERROR}
    if not wrong:
        return None
    return f"wrong (error {', '.join(f'{error:.2g} in {name}' for name, error in wrong.items())})"


def clear_gradients(leaves: Sequence[Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = None


# -------------------------------------------------------------------------------------------------------------- timing


def describe(implementation: Implementation, inputs: InputSpec, length: int, options: argparse.Namespace) -> Row:
    """What a row says before anything is measured."""
    return {
        "implementation": implementation.name,
        "inputs": inputs.name if implementation.depends_on_input else "any",
        "length": length,
        "batch": max(1, options.tokens // length),
        "heads": options.heads,
        "dim": options.dim,
        "documents": options.documents,
        "alpha": alpha_of(implementation, options.alpha) if implementation.entmax else None,
    }


def measure(implementation: Implementation, inputs: InputSpec, length: int, options: argparse.Namespace) -> Row:
    """One row; `problem` says why it has no times, None where it has."""
    row, alpha = describe(implementation, inputs, length, options), alpha_of(implementation, options.alpha)
    try:
        q, k, v, out_gradient = make_inputs(inputs, row["batch"], options.heads, length, options.dim)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        positions = draw_documents(row["batch"], length, options.documents) if options.documents > 1 else None
        call = prepare(implementation, q, k, v, alpha, positions)
        row["errors"] = errors(call, q, k, v, out_gradient, alpha)
        row["problem"] = what_is_wrong(row["errors"])
        if row["problem"] is None:
            row |= measure_call(call, [*leaves, *call.learned], out_gradient, 1000 * options.seconds_per_timing)
    except torch.OutOfMemoryError:
        row["problem"] = "out of memory"
    except Exception as error:  # a peer may fail in ways of its own; the others shall still be timed
        row["problem"] = f"failed ({type(error).__name__}: {one_line(error)})"
    finally:
        q = k = v = out_gradient = leaves = call = positions = None
        torch.cuda.empty_cache()
    return row


def measure_call(call: Call, leaves: Sequence[Tensor], out_gradient: Tensor, milliseconds: float) -> Row:
    """Median times and extra memory of a call that has run before."""
    from triton.testing import do_bench

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call.attend()
    out.backward(out_gradient, retain_graph=True)
    extra = torch.cuda.max_memory_allocated() - before
    timing = {"warmup": milliseconds / 6, "rep": milliseconds, "return_mode": "median"}
    forward = do_bench(call.attend, **timing)
    backward = do_bench(lambda: out.backward(out_gradient, retain_graph=True), grad_to_none=leaves, **timing)
    clear_gradients(leaves)
    return {
        "forward_ms": forward,
        "backward_ms": backward,
        "sum_ms": forward + backward,
        "extra_mib": round(extra / 2**20),
    }


def measure_apart(implementation: Implementation, length: int, options: argparse.Namespace) -> list[Row]:
    """The rows of AdaSplash-2 at one length, from a process where `adasplash` is that package."""
    arguments = ["--worker", "--implementations", "adasplash2", "--lengths", str(length)]
    arguments += ["--inputs", ",".join(inputs.name for inputs in options.inputs)]
    for name in ("heads", "dim", "tokens", "alpha", "seconds_per_timing"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    paths = [str(options.adasplash2), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    with tempfile.TemporaryDirectory() as elsewhere:
        worker = subprocess.run(
            [sys.executable, str(Path(__file__).resolve()), *arguments],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, paths))},
            cwd=elsewhere,
            capture_output=True,
            text=True,
        )
    rows = [json.loads(line) for line in worker.stdout.splitlines() if line.startswith("{")]
    for inputs in options.inputs[len(rows) :]:
        reason = one_line((worker.stderr.strip().splitlines() or ["no reason given"])[-1])
        problem = f"its process ended with code {worker.returncode} ({reason})"
        rows.append(describe(implementation, inputs, length, options) | {"problem": problem})
    return rows


def rows_at(length: int, implementation: Implementation, options: argparse.Namespace):
    """Yields the rows of an implementation at one length."""
    if implementation.kind == "adasplash2" and not options.worker:
        yield from measure_apart(implementation, length, options)
        return
    for inputs in options.inputs if implementation.depends_on_input else options.inputs[:1]:
        yield measure(implementation, inputs, length, options)


def measure_all(options: argparse.Namespace, keep: Callable[[Row], None]) -> None:
    """Hands each row to `keep` as soon as it is complete."""
    counted = {}
    for length in options.lengths:
        for implementation in options.implementations:
            for row in rows_at(length, implementation, options):
                key = (row["inputs"], length, alpha_of(implementation, options.alpha))
                if implementation.entmax and not options.worker:
                    if key not in counted:
                        counted[key] = count_sparsity(*key, options)
                    row |= counted[key]
                keep(row)


def count_sparsity(inputs: str, length: int, alpha: float, options: argparse.Namespace) -> Row:
    batch = max(1, options.tokens // length)  # decides what is drawn, though only the first sample is counted
    q, k, *_ = make_inputs(parse_input(inputs), batch, options.heads, length, options.dim)
    return sparsity(q, k, alpha)._asdict()


# ---------------------------------------------------------------------------------------------------------------- main


def listed(parse: Callable) -> Callable[[str], list]:
    """For argparse: values parted by commas, their ValueErrors as its own."""

    def parse_all(text: str) -> list:
        try:
            return [parse(part) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse_all


def parse_length(text: str) -> int:
    if not text.isdigit() or int(text) == 0 or int(text) % 64:
        raise ValueError(f"Expected lengths that are multiples of 64, got '{text}'.")
    return int(text)


def parse_alpha(text: str) -> float:
    alpha = number(text)
    if not 1 < alpha <= 2:
        raise argparse.ArgumentTypeError(f"Expected 1 < alpha <= 2, got {text}.")
    return alpha


def parse_documents(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"Expected a number of documents of 1 or more, got '{text}'.")
    return int(text)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    implementations = help_text("implementations", {kind: peer.form for kind, peer in PEERS.items()})
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"{help_text('inputs', INPUTS)}\n\n{implementations}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--lengths", type=listed(parse_length), default="8192,16384,65536", help="default: %(default)s")
    parser.add_argument("--inputs", type=listed(parse_input), default=STANDARD_INPUTS, help="default: %(default)s")
    parser.add_argument(
        "--implementations",
        type=listed(parse_implementation),
        default=STANDARD_IMPLEMENTATIONS,
        help="default: %(default)s",
    )
    parser.add_argument("--heads", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--dim", type=int, default=64, help="of a head (default: %(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=65536, help="the batch is tokens // length, at least 1 (default: %(default)s)"
    )
    parser.add_argument(
        "--documents", type=parse_documents, default=1, help="packed into each text (default: %(default)s)"
    )
    parser.add_argument(
        "--alpha", type=parse_alpha, default=1.5, help="of adasplash where its name has none (default: %(default)s)"
    )
    parser.add_argument("--adasplash2", type=Path, metavar="FOLDER", help="the folder with the package of AdaSplash-2")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_attention"), help="default: %(default)s")
    parser.add_argument("--seconds-per-timing", type=float, default=0.3, help="default: %(default)s")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    if not torch.cuda.is_available():
        print("Error: this benchmark needs an NVIDIA GPU, and torch finds none.", file=sys.stderr)
        return 1
    if options.worker:
        measure_all(options, lambda row: print(json.dumps(row), flush=True))
        return 0

    from attention_pictures import draw_against_length, draw_against_support, table

    from adasplash.evaluation.tables import print_tables

    for implementation in list(options.implementations):
        if reason := why_left_out(implementation, options.adasplash2, options.alpha, options.documents):
            print(f"{implementation.name} is left out: {reason}")
            options.implementations.remove(implementation)
    facts = read_facts("bench_attention.py", arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    with open(options.out / "rows.jsonl", "a") as file:

        def keep(row: Row) -> None:
            rows.append(row)
            file.write(json.dumps(row | facts) + "\n")
            file.flush()
            outcome = row.get("problem") or f"{row['sum_ms']:.2f} ms"
            print(f"{row['length']} {row['inputs']} {row['implementation']}: {outcome}", flush=True)

        measure_all(options, keep)
    if rows:
        print_tables([table(rows)])
    pictures = (
        draw_against_support(rows, options.out / "attention.png"),
        draw_against_length(rows, options.out / "lengths.png"),
    )
    print(facts_line(facts))
    print(", ".join([f"{len(rows)} rows -> {options.out / 'rows.jsonl'}", *(f"picture {x}" for x in pictures if x)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
