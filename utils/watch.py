"""Ranks that are gone: noticed by all others within a minute, named, and not waited for."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

BEAT_S = 2.0  # between two signs of life, and between two looks at those of others
# A rank that has missed so many beats is gone. Looks are counted, not seconds: whoever was stopped
# or slow itself has looked less often. A busy rank beats on: a thread of its own does.
DEAD_BEATS = 20
URGENT_BEATS = 5  # once a connection has broken
GRACE_BEATS = 15  # what a rank may take to end by itself once another has failed
ASKED_BEATS = 4 + URGENT_BEATS  # how long is asked for who that is
ASK_S = 0.5
ANSWER_S = 10.0  # what the store may take
STATUS = 2  # of a rank that is ended
MEET_S = 0.01  # between two looks for ranks that have yet to come
ROUND = "fewstep/round"  # where the main rank writes the prefix of the present board
DONE = "done"  # the last sign of life of a rank that left in order
AGAIN = "run the same command again to continue"
STORE_GONE = (
    "the store that ranks share does not answer: rank 0's host, or its torchrun, is gone or cannot "
    f"be reached; {AGAIN}"
)


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
        first_left = next(r for r in itertools.count() if r not in self.ranks)
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
        host = socket.gethostname()
        failed = Loss([rank], [host], f"rank {rank} (host {host}) failed: {text}", told=True)
        self.store.compare_set(self.key("failed"), "", failed.to_json())

    def lose(self, ranks: list[int], missed: int) -> Loss:
        """Tell that `ranks` are gone: they have missed so many beats."""
        hosts = self.read(*(self.key("name", rank) for rank in ranks))
        named = ", ".join(f"{r} (host {h})" for r, h in zip(ranks, hosts, strict=True))
        who = f"rank {named} has" if len(ranks) == 1 else f"ranks {named} have"
        lost = Loss(
            ranks,
            hosts,
            f"{who} shown no life for {missed * BEAT_S:g} s: killed or stopped, or the host is "
            f"gone; {AGAIN}",
        )
        self.store.set(self.key("lost"), lost.to_json())
        return lost


class Stillness:
    """How many looks in a row each of some keys has not changed."""

    def __init__(self, count: int) -> None:
        self.last = [""] * count
        self.looks = [0] * count

    def look(self, values: list[str]) -> None:
        """Take note of the present values; one that says DONE is never still."""
        for i, value in enumerate(values):
            moved = value == DONE or value != self.last[i]
            self.last[i], self.looks[i] = value, 0 if moved else self.looks[i] + 1

    def longer_than(self, looks: int) -> list[int]:
        """Positions of the values that have stood still for more looks than that."""
        return [i for i, count in enumerate(self.looks) if count > looks]


def meet(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> Board:
    """The board of this start of all ranks, on which each has written its keys. Collective.

    timeout_s: how long the main rank waits for the others, who wait as long as `store` does.

    A launcher that starts ranks again keeps its store, and with it what the former ones wrote. So
    each rank says hello under a name of its own, and the main one answers to that name.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        board = Board(store, f"fewstep/{own}")
        board.open(0)
        store.set(ROUND, board.prefix)
        _welcome(store, board, world_size, timeout_s)
        return board
    store.set(f"fewstep/hello/{rank}", own)
    board = Board(store, store.get(f"fewstep/welcome/{own}").decode())
    board.open(rank)
    store.set(f"fewstep/thanks/{own}", "")
    store.wait([board.key("begin")])
    return board


def _welcome(store: dist.Store, board: Board, world_size: int, timeout_s: float) -> None:
    """Answer all other ranks until each has thanked; hellos of former ones never get thanks."""
    since = time.monotonic()
    answered: dict[int, str] = {}
    absent = set(range(1, world_size))
    while absent:
        for rank in sorted(absent):
            if not store.check([f"fewstep/hello/{rank}"]):
                continue
            name = store.get(f"fewstep/hello/{rank}").decode()
            if answered.get(rank) != name:
                answered[rank] = name
                store.set(f"fewstep/welcome/{name}", board.prefix)
            elif store.check([f"fewstep/thanks/{name}"]):
                absent.remove(rank)
        if absent and time.monotonic() - since > timeout_s:
            raise dist.DistStoreError(f"ranks {sorted(absent)} did not come within {timeout_s:g} s")
        time.sleep(MEET_S)
    store.set(board.key("begin"), "")


def end_process(text: str) -> None:
    """Say why on stderr and end at once: the main thread waits in a collective, for ever."""
    if text:
        os.write(2, f"error: {text}\n".encode())
    os._exit(STATUS)


class Watch:
    """Two threads of a rank: one beats and looks, one ends the process when it must not wait on.

    The main rank looks at all others, which look at it and at what it found: two messages per rank
    and beat, however many ranks there are. `board` is used by these threads alone.
    """

    def __init__(
        self,
        board: Board,
        rank: int,
        world_size: int,
        *,
        local_rank: int,
        end: Callable[[str], None] = end_process,
    ) -> None:
        self._board = board
        self._rank, self._local_rank = rank, local_rank
        self._watched = world_size if rank == 0 else 1  # ranks, from the main one on
        self._end = end
        self._over = threading.Event()
        self._looks = 0  # that were answered
        self._loss: Loss | None = None
        self._failure: Loss | None = None
        self._still = Stillness(self._watched)
        self._threads = [
            threading.Thread(target=target, name=f"fewstep {target.__name__}", daemon=True)
            for target in (self._beat, self._judge)
        ]

    def start(self) -> None:
        """Begin; the keys of all ranks are there."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End it in order: the others expect no more life of this rank."""
        self._over.set()
        for thread in self._threads:
            thread.join(BEAT_S)
        if not self._threads[0].is_alive():
            with contextlib.suppress(dist.DistError):  # without a store nobody looks
                self._board.store.set(self._board.key("beat", self._rank), DONE)

    def _beat(self) -> None:
        board = self._board
        for count in itertools.count(1):
            if self._over.wait(BEAT_S):
                return
            try:
                board.store.set(board.key("beat", self._rank), str(count))
                self._look()
            except dist.DistError:
                continue  # `_judge` counts what is not answered
            self._looks += 1

    def _look(self) -> None:
        board = self._board
        keys = [board.key(what) for what in ("lost", "failed", "urgent")]
        keys += [board.key("beat", rank) for rank in range(self._watched)]
        lost, failed, urgent, *beats = board.read(*keys)
        self._loss, self._failure = Loss.from_json(lost), Loss.from_json(failed)
        self._still.look(beats)
        allowed = URGENT_BEATS if urgent else DEAD_BEATS
        dead = [] if self._loss else self._still.longer_than(allowed)
        if dead:
            self._loss = board.lose(dead, allowed)

    def _judge(self) -> None:
        """Seconds are counted in beats here too, for the same reason."""
        answers, losing, failing = Stillness(1), 0, 0
        while not self._over.wait(BEAT_S):
            answers.look([str(self._looks)])
            losing += self._loss is not None
            failing += self._failure is not None
            if losing > 1 and self._loss is not None:  # the main thread may be about to say it
                self._leave(self._loss)
            elif failing > GRACE_BEATS and self._failure is not None:
                self._leave(self._failure)
            elif answers.longer_than(DEAD_BEATS):
                self._leave(Loss([], [], STORE_GONE))
            else:
                continue
            return

    def _leave(self, loss: Loss) -> None:
        if self._over.is_set():
            return
        speaks = loss.told_by(self._rank, self._local_rank)
        self._end(f"rank {self._rank}: {loss.text}" if speaks else "")


@contextlib.contextmanager
def watched(board: Board, rank: int, world_size: int, local_rank: int) -> Iterator[None]:
    """Within the body no rank waits for one that is gone, or that failed, for more than a minute.

    An exception that leaves the body is told to the others, but for one of a user's: Ctrl-C.
    """
    if world_size == 1:
        yield
        return
    # A store serves one call at a time, and some wait long.
    own: dist.Store = board.store.clone()  # type: ignore[attr-defined]

    own.set_timeout(timedelta(seconds=ANSWER_S))
    watch = Watch(Board(own, board.prefix), rank, world_size, local_rank=local_rank)
    watch.start()
    try:
        yield
    except Exception as error:
        with contextlib.suppress(dist.DistError):
            words = f"{type(error).__name__}: {error}".partition("\n")[0]
            board.fail(rank, words.removesuffix(": "))
        raise
    finally:
        watch.close()


def find_loss(board: Board, rank: int) -> Loss | None:
    """Who is gone, or failed, now that a connection has broken; None = all live, or left in order.

    Called where the watch still runs. The main rank's looks for whoever has fallen silent.
    """
    board.store.set(board.key("urgent"), "1")
    main = Stillness(1)
    for _ in range(int(ASKED_BEATS * BEAT_S / ASK_S)):
        found = board.failure() or board.loss()
        beat = board.read(board.key("beat", 0))
        if found is not None or (beat == [DONE] and rank != 0):
            return found
        main.look(beat)
        if rank != 0 and main.longer_than(int(URGENT_BEATS * BEAT_S / ASK_S)):
            return board.lose([0], URGENT_BEATS)
        time.sleep(ASK_S)
    return None
