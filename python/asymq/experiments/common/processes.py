"""One model on several processes, started by torchrun or accelerate launch."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from asymq.training import shard

T = TypeVar("T")


class Processes:
    """The processes that train one model together, of which this is number `rank` of `count`.

    Every process holds all ranges in float32. The weights are replicated too, or with `shard` split
    among the processes (FSDP2).
    """

    def __init__(self, device: str | torch.device | None = None, shard: bool = False):
        """device: None is the GPU of this process, or the CPU where there is none."""
        self.rank = int(os.environ.get("RANK", 0))
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        if device is None:
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if has_gpu() else "cpu"
        self.device = torch.device(device)
        self.shard = shard
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.count > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def end(self) -> None:
        """Together: a process that left early would take the connections of the others along."""
        if dist.is_initialized():
            # A split model holds its group's connections, and itself in cycles: they must close
            # before the interpreter does.
            gc.collect()
            dist.barrier()
            dist.destroy_process_group()

    def share(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, everywhere. An error of it is raised everywhere
        too: nobody waits for a process that has given up."""
        if self.count == 1:
            return make()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = make()
            except Exception as raised:
                outcome[1] = raised
        dist.broadcast_object_list(outcome, device=self.device)
        value, error = outcome
        if error is not None:
            raise error
        return value

    def place(self, model: nn.Module) -> nn.Module:
        """Puts a model where it is to run, its weights split if they are to be."""
        if not self.shard:
            return model.to(self.device)
        mesh = dist.init_device_mesh(self.device.type, (self.count,))
        for module in model.modules():
            if isinstance(module, nn.ModuleList):
                for block in module:
                    shard(block, mesh=mesh)
        return shard(model, mesh=mesh)

    def replicate(self, model: nn.Module) -> nn.Module:
        """What to call instead of a placed model, so that its ranges get the gradients of the whole
        batch."""
        if self.count == 1 or self.shard:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, devices)

    def rows(self, batch: Tensor) -> Tensor:
        """This process's part of a batch, of which every process gets as many rows."""
        return batch[self.rank :: self.count].to(self.device)

    def mean(self, value: Tensor) -> Tensor:
        """Its mean over the processes."""
        if self.count > 1:
            dist.all_reduce(value)
            value = value / self.count
        return value


def has_gpu() -> bool:
    return torch.cuda.is_available()


def processors() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
