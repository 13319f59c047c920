"""Several processes that train one network: started by `torchrun`, one for every GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from edgead.errors import TrainingError


@dataclass(frozen=True)
class Group:
    """The processes of a run; a single one without `torchrun`.

    Attributes:
        rank: Number of this process; only number 0 writes files and shows progress.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    def share(self, batch: int) -> range:
        """The positions in a batch that this process takes.

        Raises:
            TrainingError: the batch cannot be divided evenly.
        """
        if batch % self.size:
            raise TrainingError(
                f"--batch {batch} counts the images of all {self.size} processes together and must be"
                f" a multiple of {self.size}"
            )
        count = batch // self.size
        return range(self.rank * count, (self.rank + 1) * count)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes, in each of them."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network whose backward pass averages gradients over all processes."""
        return nn.parallel.DistributedDataParallel(network) if self.size > 1 else network


@contextmanager
def process_group(device: torch.device) -> Iterator[Group]:
    """The group that `torchrun` describes in the environment (WORLD_SIZE, RANK ...), for one run.

    NCCL connects GPUs, Gloo CPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Group()
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Group(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


def own_device(device: torch.device) -> torch.device:
    """The GPU of this process: that of its number on this machine, unless one was named."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device
