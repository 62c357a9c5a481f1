"""The process group's lifetime, the facts about ranks, and the collectives others borrow."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from utils.board import ROUND, Board, fail_early, meet
from utils.errors import UserError, words
from utils.launcher import end_with_launcher
from utils.liveness import working
from utils.watch import STORE_GONE, find_loss, watched

T = TypeVar("T")

TIMEOUT_S = 1800.0
TOLD_S = 5.0  # how long a failing rank waits for the main rank to fail with the same words
_LOST = re.compile(r"Connection (closed|reset) by peer|Broken pipe|remote process exited")


@dataclass(frozen=True)
class Session:
    """Who this process is among all ranks, and where its tensors live."""

    rank: int
    world_size: int
    device: torch.device
    store: dist.Store | None = None  # shared by all ranks; None = there is one rank
    timeout_s: float = TIMEOUT_S  # how long a rank may keep the others waiting
    group: int = 1  # so many neighbouring ranks work on the same samples
    channel: dist.ProcessGroup | None = None  # which its collectives go through; None = the usual

    @property
    def data_rank(self) -> int:
        """Which share of the samples is this rank's, from 0 on."""
        return self.rank // self.group

    @property
    def data_world(self) -> int:
        """How many shares of the samples there are."""
        return self.world_size // self.group

    @property
    def leads(self) -> bool:
        """Whether this rank writes what its group makes."""
        return self.rank % self.group == 0

    @property
    def is_main(self) -> bool:
        """Whether this rank writes logs, pictures and manifests."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean of `values` over ranks. Collective; returns a new tensor."""
        if self.world_size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total, group=self.channel)
        return total / self.world_size

    def any(self, flag: bool) -> bool:
        """Whether any rank raised `flag`. Collective on the CPU: no device is waited for."""
        return bool(self.most_of(int(flag))[0])

    def most_of(self, *numbers: int) -> tuple[int, ...]:
        """The largest of any rank, of each number. Collective on the CPU, as `any`."""
        if self.world_size == 1:
            return numbers
        largest = torch.tensor(numbers)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.channel)
        return tuple(largest.tolist())

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.any(False)

    def on_main(self, task: Callable[[], object]) -> None:
        """Do `task` on the main rank; where it fails, every rank raises. Collective."""
        failure, told = None, ""
        if self.is_main:
            try:
                task()
            except Exception as error:
                failure, told = error, words(error) or f"rank 0 failed: {type(error).__name__}"
        told = self.from_main(told)
        if failure is not None:
            raise failure
        if told:
            raise UserError(told)

    def together(self, task: Callable[[], object]) -> None:
        """Do `task` on every rank; where it fails on any, every rank raises. Collective."""
        failure, told = None, ""
        try:
            task()
        except Exception as error:
            failure, told = error, words(error) or f"failed: {type(error).__name__}: {error}"
        texts = self.gather(told)
        if failure is not None and (words(failure) is None or len(set(texts)) == 1):
            raise failure
        lines = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text]
        if lines:
            raise UserError("\n".join(lines)) from failure

    @contextlib.contextmanager
    def uneven_work(self) -> Iterator[None]:
        """Around what takes each rank its own time: at its end all wait for the slowest.

        However long that takes, unlike a barrier, which ends the job after `timeout_s`. Collective
        at both ends; within, no collectives. Those that wait get a LostRankError that names the
        rank when another raises, or shows no life for `timeout_s`.
        """
        if self.world_size == 1:
            yield
            return
        assert self.store is not None, "several ranks share a store"
        with working(self.store, self.rank, self.world_size, self.timeout_s, self.barrier):
            yield

    def from_main(self, value: str) -> str:
        """The main rank's `value`, on every rank. Collective."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.channel, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: T) -> list[T]:
        """The `value` of every rank, in their order, on every rank. Collective; no tensors."""
        if self.world_size == 1:
            return [value]
        values = [value] * self.world_size
        dist.all_gather_object(values, value, group=self.channel)
        return values


@dataclass(frozen=True)
class Launch:
    """What the launcher tells a process, known with no process group; ranks meet in its store."""

    rank: int
    world_size: int
    local_rank: int = 0

    @classmethod
    def here(cls) -> Launch:
        """Of this process; without a launcher it is alone."""
        usual = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        return cls(*(int(os.environ.get(key, default)) for key, default in usual))

    def told_by_main(self, text: str) -> bool:
        """Note that this rank fails with `text`; whether the main rank does with the same words.

        Ranks check the same things and fail within moments of each other, so a short wait tells
        those that fail alike from those that fail alone. Nobody else is waited for.
        """
        if self.world_size == 1:
            return False
        try:
            store = self._store()
            board = _board(store)
            prefix = "fewstep/apart" if board is None else board.prefix
            store.set(f"{prefix}/failure/{self.rank}", text)
            fail_early(store, self.rank, "; ".join(text.splitlines()))
            if board is not None:
                board.fail(self.rank, "; ".join(text.splitlines()))
            if self.rank == 0:
                return False
            store.wait([f"{prefix}/failure/0"], timedelta(seconds=TOLD_S))
            return store.get(f"{prefix}/failure/0").decode() == text
        except RuntimeError:  # torch.distributed's errors: the main rank does not fail, or is gone
            return False

    def lost_rank(self, error: BaseException) -> str | None:
        """What to say of `error` if it tells no more than that another rank went.

        Empty if nothing needs to be said: the other one told why, or another of this host does.
        None if it is another error, or the other rank left in order. Waits until it is known who
        is gone.
        """
        if self.world_size == 1 or not _LOST.search(str(error)):
            return None
        try:
            board = _board(self._store())
            loss = None if board is None else find_loss(board, self.rank)
        except RuntimeError:
            return STORE_GONE
        if loss is None:
            return None
        return loss.text if loss.told_by(self.rank, self.local_rank) else ""

    def _store(self) -> dist.Store:
        return dist.TCPStore(
            os.environ.get("MASTER_ADDR", "localhost"),
            int(os.environ.get("MASTER_PORT", "29500")),
            is_master=False,
            timeout=timedelta(seconds=TOLD_S),
        )


def _board(store: dist.Store) -> Board | None:
    """The present board in the launcher's store; None = ranks have not met yet."""
    return Board(store, store.get(ROUND).decode()) if store.check([ROUND]) else None


@contextlib.contextmanager
def distributed_session(*, timeout_s: float = TIMEOUT_S) -> Iterator[Session]:
    """Open the process group that torchrun describes, or a group of one, and close it at the end.

    A rank that waits longer than `timeout_s` for another raises instead of hanging; one that waits
    for a rank that is gone is ended within a minute; one whose launcher is gone is asked to stop.
    """
    end_with_launcher()
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_s)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    store: dist.Store
    if "RANK" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
    else:
        store, rank, world_size = dist.HashStore(), 0, 1
    board = meet(store, rank, world_size, timeout_s)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"{board.prefix}/group", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    own_store = dist.PrefixStore(f"{board.prefix}/session", store)
    try:
        with watched(board, rank, world_size, local_rank):
            yield Session(rank, world_size, device, own_store, timeout_s)
    finally:
        dist.destroy_process_group()
        # gloo's threads have yet to drop the last collective's tensors, which takes the GIL; asked
        # for while Python shuts down, it aborts the process: 30 of 80 exits without this, 0 with.
        time.sleep(0.02)
