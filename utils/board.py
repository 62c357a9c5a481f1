"""What ranks tell each other in their launcher's store: who is there, who lives, who failed."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass
from itertools import count

import torch.distributed as dist

STATUS = 2  # of a rank that ends because of another
DONE = "done"  # the last sign of life of a rank that left in order
AGAIN = "run the same command again to continue"
MEET_S = 0.01  # between two looks for ranks that have yet to come
FAILED_S = 5.0  # before a rank's word counts that it will not come: it may be a former one's
ROUND = "fewstep/round"  # where the main rank writes the prefix of the present board
_FAILED = "failed: "


@dataclass(frozen=True)
class Loss:
    """Ranks that are gone, and what to say of them."""

    ranks: list[int]
    hosts: list[str]
    text: str
    told: bool = False  # by the rank itself, on its host

    def to_json(self) -> str:
        """As it lies in the store."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Loss | None:
        """What `to_json` gave; None for an empty text: nobody is gone."""
        return cls(**json.loads(text)) if text else None

    def told_by(self, rank: int, local_rank: int) -> bool:
        """Whether `rank` says it: one of each host, and the first that is left, do."""
        if self.told and self.hosts == [socket.gethostname()]:
            return False
        first_left = next(r for r in count() if r not in self.ranks)
        return local_rank == 0 or rank == first_left


@dataclass(frozen=True)
class Board:
    """What ranks tell each other in the store, in one round: one start of all of them.

    Each key but `name` and `beat` is written by whoever is first, and is there from the beginning.
    """

    store: dist.Store
    prefix: str  # of this round

    def key(self, what: str, rank: int | None = None) -> str:
        """The store's key; rank: whose it is, None = all ranks'."""
        return f"{self.prefix}/{what}" + ("" if rank is None else f"/{rank}")

    def open(self, rank: int) -> None:
        """Write this rank's keys, and on the main one those of all. Before anyone reads."""
        self.store.set(self.key("name", rank), socket.gethostname())
        self.store.set(self.key("beat", rank), "0")
        if rank == 0:
            for what in ("lost", "failed", "urgent"):
                self.store.set(self.key(what), "")

    def read(self, *keys: str) -> list[str]:
        """The values of keys that are there."""
        return [value.decode(errors="replace") for value in self.store.multi_get(list(keys))]

    def loss(self) -> Loss | None:
        """Who is gone, if anyone has noticed."""
        return Loss.from_json(self.read(self.key("lost"))[0])

    def failure(self) -> Loss | None:
        """Which rank has failed and told why, if one has."""
        return Loss.from_json(self.read(self.key("failed"))[0])

    def fail(self, rank: int, text: str) -> None:
        """Tell that `rank` fails, and why; the first to fail is remembered."""
        failed = _failed(rank, text)
        self.store.compare_set(self.key("failed"), "", failed.to_json())

    def lose(self, ranks: list[int], silent_s: float) -> Loss:
        """Tell that `ranks` are gone: they have shown no life for so long."""
        hosts = self.read(*(self.key("name", rank) for rank in ranks))
        named = ", ".join(f"{r} (host {h})" for r, h in zip(ranks, hosts, strict=True))
        who = f"rank {named} has" if len(ranks) == 1 else f"ranks {named} have"
        lost = Loss(
            ranks,
            hosts,
            f"{who} shown no life for {silent_s:g} s: killed or stopped, or the host is "
            f"gone; {AGAIN}",
        )
        self.store.set(self.key("lost"), lost.to_json())
        return lost


def spoken(rank: int, line: str) -> str:
    """A line as `rank` says it: others than the main one begin with their number."""
    return f"rank {rank}: {line}" if rank else line


def meet(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> Board:
    """The board of this start of all ranks, on which each has written its keys. Collective.

    A launcher that starts ranks again keeps its store, and with it what the former ones wrote. So
    each rank says hello under a name of its own, and the main one answers to that name.
    timeout_s: how long the main rank waits for the others, who wait as long as `store` does.
    Raises SystemExit, having said why, if another rank failed before it came.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        board = Board(store, f"fewstep/{own}")
        board.open(0)
        store.set(ROUND, board.prefix)
        failed = _welcome(store, board, world_size, timeout_s)
        store.set(board.key("begin"), failed)
    else:
        store.set(_hello(rank), own)
        board = Board(store, store.get(f"fewstep/welcome/{own}").decode())
        board.open(rank)
        store.set(f"fewstep/thanks/{own}", "")
        failed = store.get(board.key("begin")).decode()
    loss = Loss.from_json(failed)
    if loss is not None:
        if loss.told_by(rank, int(os.environ.get("LOCAL_RANK", "0"))):
            os.write(2, f"error: {spoken(rank, loss.text)}\n".encode())
        raise SystemExit(STATUS)
    return board


def fail_early(store: dist.Store, rank: int, text: str) -> None:
    """Tell whoever waits in `meet` that `rank` will not come, and why."""
    store.set(_hello(rank), _FAILED + _failed(rank, text).to_json())


def _hello(rank: int) -> str:
    return f"fewstep/hello/{rank}"  # not the count of restarts, which hosts that came later lack


def _failed(rank: int, text: str) -> Loss:
    host = socket.gethostname()
    return Loss([rank], [host], f"rank {rank} (host {host}) failed: {text}", told=True)


def _welcome(store: dist.Store, board: Board, world_size: int, timeout_s: float) -> str:
    """Answer all other ranks until each has thanked; returns the Loss of one that will not come.

    Hellos of former ranks never get thanks, and are soon replaced.
    """
    since = time.monotonic()
    answered: dict[int, str] = {}
    failed = ""
    absent = set(range(1, world_size))
    while absent:
        waited = time.monotonic() - since
        for rank in sorted(absent):
            if not store.check([_hello(rank)]):
                continue
            name = store.get(_hello(rank)).decode()
            if name.startswith(_FAILED):
                failed = name.removeprefix(_FAILED)
            elif answered.get(rank) != name:
                answered[rank] = name
                store.set(f"fewstep/welcome/{name}", board.prefix)
            elif store.check([f"fewstep/thanks/{name}"]):
                absent.remove(rank)
        if failed and waited > FAILED_S:
            return failed
        if absent and waited > timeout_s:
            raise dist.DistStoreError(f"ranks {sorted(absent)} did not come within {timeout_s:g} s")
        time.sleep(MEET_S)
    return ""
