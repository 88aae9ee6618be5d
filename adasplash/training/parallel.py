"""One process or one per GPU: what a rank knows of the others. Models do not know of it."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .config import ParallelConfig


@dataclass(frozen=True)
class Ranks:
    """This process among all: rank, number of processes, its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, *numbers: float) -> list[float]:
        """Each number summed over the ranks (float64)."""
        if self.world_size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of all ranks (names differ), on the CPU, at rank 0; empty elsewhere."""
        if self.world_size == 1:
            return tensors
        gathered = [None] * self.world_size if self.first else None
        dist.gather_object({name: tensor.cpu() for name, tensor in tensors.items()}, gathered)
        return {name: tensor for part in gathered or [] for name, tensor in part.items()}

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


@contextlib.contextmanager
def start_ranks(config: ParallelConfig, device: str):
    """Joins the process group where there is one; yields Ranks.

    Raises:
        ValueError: if the way the program was started and `parallel` do not go together.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        raise ValueError("device=cuda, but PyTorch finds no GPU here; use device=cpu or device=auto.")
    if config.kind == "none":
        if world_size > 1:
            raise ValueError(f"Started as {world_size} processes, but parallel=none; add parallel=ddp.")
        yield Ranks(0, 1, torch.device(device if device != "auto" else ("cuda" if cuda else "cpu")))
        return
    if "RANK" not in os.environ:
        raise ValueError(
            f"parallel={config.kind} needs torchrun: torchrun --nproc_per_node=2 train.py parallel={config.kind} ..."
        )
    local = int(os.environ["LOCAL_RANK"])
    if cuda and local >= torch.cuda.device_count():
        raise ValueError(f"Rank {local} finds {torch.cuda.device_count()} GPUs; start at most as many processes.")
    rank_device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(rank_device)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=rank_device if cuda else None)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), rank_device)
    finally:
        dist.destroy_process_group()


def parallelize(model: nn.Module, ranks: Ranks) -> nn.Module:
    """The model whose backward pass averages gradients over the ranks."""
    if ranks.world_size == 1:
        return model
    # buffers (hash directions, alpha) are the same on every rank by seed and schedule: nothing to broadcast
    return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def exchange_gradients(model: nn.Module, exchange: bool):
    """Context of a forward and backward pass; gradients need to go between the ranks once a step only."""
    if isinstance(model, DistributedDataParallel) and not exchange:
        return model.no_sync()
    return contextlib.nullcontext()
