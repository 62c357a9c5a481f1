"""The process group's lifetime, the facts about ranks, and the collectives others borrow."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Session:
    """Who this process is among all ranks, and where its tensors live."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes logs, pictures and manifests."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean of `values` over ranks. Collective; returns a new tensor."""
        if self.world_size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total / self.world_size

    def any(self, flag: bool) -> bool:
        """Whether any rank raised `flag`. Collective on the CPU: no device is waited for."""
        if self.world_size == 1:
            return flag
        raised = torch.tensor(int(flag))
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return bool(raised)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.any(False)

    def from_main(self, value: str) -> str:
        """The main rank's `value`, on every rank. Collective."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: T) -> list[T]:
        """The `value` of every rank, in their order, on every rank. Collective; no tensors."""
        if self.world_size == 1:
            return [value]
        values = [value] * self.world_size
        dist.all_gather_object(values, value)
        return values


@contextlib.contextmanager
def distributed_session(*, timeout_s: float = 1800.0) -> Iterator[Session]:
    """Open the process group that torchrun describes, or a group of one, and close it at the end.

    A rank that waits longer than `timeout_s` for another raises instead of hanging.
    """
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_s)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
    try:
        yield Session(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()
        # gloo's threads have yet to drop the last collective's tensors, which takes the GIL; asked
        # for while Python shuts down, it aborts the process: 30 of 80 exits without this, 0 with.
        time.sleep(0.02)
