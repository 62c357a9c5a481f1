"""Ranks that are gone: noticed by all others within a minute, named, and not waited for."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch.distributed as dist

from utils.board import AGAIN, DONE, STATUS, Board, Loss, spoken

BEAT_S = 2.0  # between two signs of life, and between two looks at those of others
# A rank that has missed so many beats is gone. Looks are counted, not seconds: whoever was stopped
# or slow itself has looked less often. A busy rank beats on: a thread of its own does.
DEAD_BEATS = 20
URGENT_BEATS = 5  # once a connection has broken
GRACE_BEATS = 15  # what a rank may take to end by itself once another has failed
ASKED_BEATS = 4 + URGENT_BEATS  # how long is asked for who is gone
ASKS = 4  # in each beat
ANSWER_S = 10.0  # what the store may take
STORE_GONE = (
    "the store that ranks share does not answer: rank 0 was killed, or its host or its torchrun is "
    f"gone or cannot be reached; {AGAIN}"
)


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


def end_process(text: str) -> None:
    """Say why on stderr and end at once: the main thread waits in a collective, for ever."""
    if text:
        os.write(2, f"\nerror: {text}\n".encode())  # a progress bar ends without a line break
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
        self._threads[1].join(BEAT_S)
        self._say_done()

    def _say_done(self) -> None:
        self._threads[0].join(BEAT_S)
        if not self._threads[0].is_alive():  # else the store does not answer
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
            self._loss = board.lose(dead, allowed * BEAT_S)

    def _judge(self) -> None:
        """Seconds are counted in beats here too, for the same reason."""
        answers, losing, failing = Stillness(1), 0, 0
        while not self._over.wait(BEAT_S):
            answers.look([str(self._looks)])
            losing += self._loss is not None
            failing += self._failure is not None and self._rank not in self._failure.ranks
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
        self._over.set()
        self._say_done()  # nobody should take this rank for the one that was lost
        speaks = loss.told_by(self._rank, self._local_rank)
        self._end(spoken(self._rank, loss.text) if speaks else "")


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
        if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            _linger(board, world_size)


def _linger(board: Board, world_size: int) -> None:
    """Stay while others read why this run ends: the store goes with the main rank's process."""
    beats = [board.key("beat", rank) for rank in range(world_size)]
    for _ in range(URGENT_BEATS * ASKS):
        if board.failure() is None or board.read(*beats) == [DONE] * world_size:
            return
        time.sleep(BEAT_S / ASKS)


def find_loss(board: Board, rank: int) -> Loss | None:
    """Who is gone, or failed, now that a connection has broken; None = all live, or left in order.

    Called where the watch still runs. The main rank's looks for whoever has fallen silent.
    """
    board.store.set(board.key("urgent"), "1")
    main = Stillness(1)
    for _ in range(ASKED_BEATS * ASKS):
        found = board.failure() or board.loss()
        beat = board.read(board.key("beat", 0))
        if found is not None or (beat == [DONE] and rank != 0):
            return found
        main.look(beat)
        if rank != 0 and main.longer_than(URGENT_BEATS * ASKS):
            return board.lose([0], URGENT_BEATS * BEAT_S)
        time.sleep(BEAT_S / ASKS)
    return None
