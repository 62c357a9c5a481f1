"""Run a function on several ranks: real processes under gloo, one thread each, none left behind."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from utils import distributed, watch

# Imported once by the server that ranks are forked from; each would cost a rank seconds.
PRELOAD = [
    "tests.conftest",
    "trainer.build",
    "inference",
    "transformers.models.umt5.modeling_umt5",
    "transformers.models.auto.tokenization_auto",
    "diffusers.schedulers",
]
HOST = "127.0.0.1"
BEAT_S, TOLD_S = 0.1, 0.25  # of `lone_ranks`: a twentieth of what is usual
EXIT_S = 10.0  # what a rank that is done may take to leave


class RankFailedError(RuntimeError):
    """A rank raised, died or hung; the message holds its traceback."""

    def __init__(self, rank: int, message: str, exitcode: int | None = None) -> None:
        super().__init__(f"rank {rank}: {message}")
        self.exitcode = exitcode  # negative signal number if a signal killed it


@dataclass(frozen=True)
class Place:
    """What torchrun would tell a rank through its environment."""

    rank: int
    world: int
    local_world: int
    port: int
    gpus: bool = False

    def environment(self) -> dict[str, str]:
        """The variables, all text."""
        hidden = {} if self.gpus else {"CUDA_VISIBLE_DEVICES": ""}
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": str(self.rank % self.local_world),
            "LOCAL_WORLD_SIZE": str(self.local_world),
            "MASTER_ADDR": HOST,
            "MASTER_PORT": str(self.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is the parent's, as under torchrun
            "TORCHELASTIC_RESTART_COUNT": "0",
            **hidden,
        }


def run_on_ranks(
    world: int,
    function: Callable[..., Any],
    *arguments: Any,
    local_world: int | None = None,
    gpus: bool = False,
    timeout_s: float = 120.0,
) -> list[Any]:
    """Call `function(*arguments)` on `world` ranks; returns what it returned, in rank order.

    `function` must be importable and opens the process group itself, once. `local_world`: ranks
    per node, None = all on one. gpus: whether ranks see them; most of these tests are about
    processes. Raises RankFailedError with the first failing traceback.
    """
    # CUDA does not survive a fork of a process that has touched it.
    context = multiprocessing.get_context("spawn" if gpus else "forkserver")
    context.set_forkserver_preload(PRELOAD)
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    processes, connections = [], []
    for rank in range(world):
        here, there = context.Pipe(duplex=False)
        place = Place(rank, world, local_world or world, store.port, gpus)
        process = context.Process(
            target=_work, args=(place, there, function, arguments), daemon=True
        )
        process.start()
        there.close()
        processes.append(process)
        connections.append(here)
    try:
        results = _collect(processes, connections, time.monotonic() + timeout_s)
        for process in processes:
            process.join(EXIT_S)
        return results
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(
    processes: Sequence[BaseProcess], connections: Sequence[Connection], deadline: float
) -> list[Any]:
    results: dict[int, Any] = {}
    waiting: dict[Connection, int] = {connection: i for i, connection in enumerate(connections)}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailedError(
                min(waiting.values()), f"hung, and so did {len(waiting) - 1} others"
            )
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = waiting.pop(connection)
            try:
                failure, results[rank] = pickle.loads(connection.recv_bytes())
            except EOFError:
                processes[rank].join()
                code = processes[rank].exitcode
                raise RankFailedError(rank, f"died with exit status {code}", code) from None
            if failure:
                raise RankFailedError(rank, failure)
    return [results[rank] for rank in range(len(processes))]


def _work(
    place: Place, connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(place.environment())
    try:
        outcome = (None, function(*arguments))
    except Exception:
        outcome = (traceback.format_exc(), None)
    connection.send_bytes(pickle.dumps(outcome))
    connection.close()


@contextmanager
def lone_ranks(
    world: int,
    folder: Path,
    function: Callable[..., int],
    *arguments: Any,
    store: TCPStore | None = None,
) -> Iterator[list[BaseProcess]]:
    """Ranks that may die: each runs `function(*arguments)` for its exit status, with a fast pulse.

    What a rank says on stderr lies in <folder>/<rank>. store: where they meet, if not one of ours.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    store = store or TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    processes = [
        context.Process(
            target=_live,
            args=(Place(rank, world, 1, store.port), folder / str(rank), function, arguments),
        )
        for rank in range(world)
    ]
    try:
        for process in processes:
            process.start()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def _live(
    place: Place, said: Path, function: Callable[..., int], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    os.environ.update(place.environment())
    watch.BEAT_S, distributed.TOLD_S = BEAT_S, TOLD_S
    sys.exit(function(*arguments))
