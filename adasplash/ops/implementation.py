"""Which implementation runs: Triton kernels where they can, the torch reference elsewhere."""

from __future__ import annotations

import importlib.util

import torch

from .announce import announce
from .checks import check_choice

IMPLEMENTATIONS = ("auto", "triton", "reference")
LARGEST_DIM = 256
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HAS_TRITON = importlib.util.find_spec("triton") is not None


def why_no_kernels(device: torch.device, dtype: torch.dtype, dim: int = 1) -> str | None:
    """Why the kernels cannot run for tensors with heads of `dim`, or None where they can."""
    if device.type != "cuda":
        return "the kernels need a GPU"
    if torch.version.hip:
        return "the kernels are written for GPUs of NVIDIA"
    if not HAS_TRITON:
        return "the package triton is not installed"
    if torch.cuda.get_device_properties(device).major < 8:
        return "the kernels need compute capability 8.0"
    if dtype not in KERNEL_DTYPES:
        return f"the kernels know no {dtype}"
    if dim > LARGEST_DIM:
        return f"the kernels know head dims up to {LARGEST_DIM}"
    return None


def choose_implementation(implementation: str, device: torch.device, dtype: torch.dtype, dim: int = 1) -> str:
    """'triton' or 'reference'; says so, once, where a GPU is there and the reference is taken nevertheless.

    Raises:
        ValueError: where triton is asked for and cannot run.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if implementation == "reference":
        return "reference"
    reason = why_no_kernels(device, dtype, dim)
    if reason and implementation == "triton":
        raise ValueError(f"implementation=triton cannot run here: {reason}. Use implementation=auto.")
    if reason and device.type == "cuda":
        announce(f"The torch reference runs on {device.type}: {reason}.")
    return "reference" if reason else "triton"
