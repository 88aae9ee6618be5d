"""python -m adasplash: what this machine can run."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

PACKAGES = ("torch", "triton", "transformers", "datasets", "tiktoken", "hydra-core", "wandb", "flash-attn-4")


def versions() -> list[tuple[str, str]]:
    """Installed versions; 'not installed' where that is so."""
    found = [("adasplash", __import__("adasplash").__version__), ("python", platform.python_version())]
    for name in PACKAGES:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            found.append((name, "not installed"))
    return found


def try_backend(name: str, device: torch.device) -> str:
    """Runs one forward and backward pass; says what was used, or why it cannot be."""
    from .attention import BACKENDS, backend_options

    try:
        backend = BACKENDS[name](backend_options(name), heads=2, key_heads=1, head_dim=16).to(device)
        q = torch.randn(1, 2, 80, 16, device=device, requires_grad=True)
        k, v = torch.randn(2, 1, 1, 80, 16, device=device).unbind()
        out = backend(q, k, v)
        out.sum().backward()
        if not (out.isfinite().all() and q.grad.isfinite().all()):
            return "broken: the result is not finite"
    except Exception as error:  # the report goes on with the next backend
        return f"not usable: {type(error).__name__}: {error}"
    return "usable"


def main() -> int:
    for name, version in versions():
        print(f"{name:14s} {version}")
    if torch.cuda.is_available():
        device = torch.device("cuda")
        properties = torch.cuda.get_device_properties(device)
        print(
            f"{'GPU':14s} {torch.cuda.device_count()} x {properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"compute capability {properties.major}.{properties.minor}"
        )
    else:
        device = torch.device("cpu")
        why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "no GPU or driver found"
        print(f"{'GPU':14s} none ({why}): everything runs on the CPU, the sparse backends by their torch reference")
    print()
    from .attention import BACKENDS

    for name in BACKENDS:
        print(f"attention={name:12s} {try_backend(name, device)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
