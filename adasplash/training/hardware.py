"""What this machine can do: its peak rate, for MFU."""

from __future__ import annotations

import torch

# Dense bf16 peak in FLOP/s by the vendors' data sheets, by a part of the device's name; the first match counts.
BF16_PEAKS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200": 9.89e14,
    "H100 PCIe": 7.56e14,
    "H100": 9.89e14,
    "A100": 3.12e14,
    "L40S": 3.62e14,
    "RTX 4090": 1.65e14,
}


def peak_flops(device: torch.device) -> float | None:
    """Peak bf16 rate of a known GPU; None for others, whose MFU is then not reported."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in BF16_PEAKS.items() if part in name), None)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
