"""Tile shapes of the kernels: found by measuring, looked up at run time, so that a first call compiles one variant only."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

# Bytes that the tiles below need at most: what a program can have on an A100 (163 KB) or a Hopper (227 KB), but not on
# GPUs for graphics (99 KB).
SHARED_MEMORY = 160 * 1024


class Tiles(NamedTuple):
    """Shape of one kernel's programs: rows and columns of a score tile, warps, stages of the software pipeline.

    registers: at most so many for a thread, where more programs at once are worth some spilling; None: as needed.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    registers: int | None = None

    def launch_options(self) -> dict:
        options = {"num_warps": self.warps, "STAGES": self.stages}
        return options if self.registers is None else {**options, "maxnreg": self.registers}

    def halved(self) -> Tiles:
        return self._replace(block_m=max(16, self.block_m // 2))


def block_dim(dim: int) -> int:
    """The head dim as kernels hold it: a power of two, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())


@functools.cache
def has_little_shared_memory(device: torch.device) -> bool:
    return (
        device.type == "cuda" and torch.cuda.get_device_properties(device).shared_memory_per_block_optin < SHARED_MEMORY
    )


def fitting(table):
    """Of a table of tiles by (dim, dtype) one by (dim, dtype, device): tiles half as high where shared memory is short (those of `collect` always fit)."""

    @functools.wraps(table)
    def for_device(dim: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tiles]:
        tiles = table(dim, dtype)
        if block_dim(dim) <= 64 or not has_little_shared_memory(device):
            return tiles
        return {name: shape if name == "collect" else shape.halved() for name, shape in tiles.items()}

    return for_device


@fitting
def entmax_tiles(dim: int, dtype: torch.dtype) -> dict[str, Tiles]:
    """Tiles of the kernels of entmax attention for a head dim and dtype; block_m of `collect` is a multiple of the others'.

    Measured on an H200.
    """
    wide = block_dim(dim)
    if dtype == torch.float32:
        tiles = Tiles(64, 32, 4, 1) if wide <= 128 else Tiles(32, 16, 8, 1)
        return dict.fromkeys(("collect", "forward", "rows", "columns", "sinks"), tiles)
    if wide <= 64:
        return {
            "collect": Tiles(128, 128, 8, 3, 128),
            "forward": Tiles(64, 64, 4, 2, 128),
            "rows": Tiles(64, 64, 4, 3, 224),
            "columns": Tiles(64, 64, 4, 3),
            "sinks": Tiles(64, 64, 4, 3),
        }
    if wide <= 128:
        return {
            "collect": Tiles(128, 64, 8, 3, 128),
            "forward": Tiles(128, 64, 8, 2),
            "rows": Tiles(128, 32, 8, 2),
            "columns": Tiles(64, 64, 8, 2),
            "sinks": Tiles(64, 64, 8, 2),
        }
    return {
        "collect": Tiles(64, 64, 4, 2),
        "forward": Tiles(64, 32, 4, 2),
        "rows": Tiles(64, 32, 8, 2),
        "columns": Tiles(32, 64, 8, 2),
        "sinks": Tiles(32, 64, 8, 2),
    }


class ListShape(NamedTuple):
    """Shape of a list kernel's programs: rows (or columns) side by side, pairs of each at a time, warps.

    turns: how often a program does so. Where blocks are in tile mode there is nothing to do, and fewer programs say so sooner.
    rows * turns divides block_m of `collect`, but for columns; of `forward` it is a multiple of 4.
    """

    rows: int
    pairs: int
    warps: int
    turns: int


def list_shapes(dim: int) -> dict[str, ListShape]:
    """For the list kernels of entmax attention: as many gathers of `dim` wide rows in flight as registers allow."""
    wide = block_dim(dim)
    return {
        "forward": ListShape(2, max(1, 512 // wide), 1, 8),
        "backward": ListShape(4, max(1, 256 // wide), 1, 4),
        "transpose": ListShape(8, 8, 1, 4),
        "sort": ListShape(2, 1, 1, 2),
        "columns": ListShape(4, max(1, 128 // wide), 1, 2),
    }


@fitting
def softmax_tiles(dim: int, dtype: torch.dtype) -> dict[str, Tiles]:
    """Tiles of the kernels of softmax attention; block_m of `forward` is a multiple of that of `columns`."""
    wide = block_dim(dim)
    if dtype == torch.float32:
        if wide <= 64:
            return {"forward": Tiles(64, 32, 4, 1), "rows": Tiles(64, 32, 4, 1), "columns": Tiles(32, 32, 4, 1)}
        if wide <= 128:
            return {"forward": Tiles(32, 32, 4, 1), "rows": Tiles(32, 32, 8, 1), "columns": Tiles(32, 16, 4, 1)}
        return {"forward": Tiles(16, 32, 4, 1), "rows": Tiles(16, 16, 4, 1), "columns": Tiles(16, 16, 8, 1)}
    if wide <= 64:
        return {
            "forward": Tiles(64, 64, 4, 3, 128),
            "rows": Tiles(128, 64, 8, 3, 128),
            "columns": Tiles(64, 64, 4, 3, 168),
        }
    if wide <= 128:
        return {"forward": Tiles(128, 64, 8, 3), "rows": Tiles(128, 64, 8, 2), "columns": Tiles(64, 128, 8, 2)}
    return {"forward": Tiles(128, 32, 8, 2), "rows": Tiles(64, 32, 8, 2), "columns": Tiles(32, 64, 8, 2)}
