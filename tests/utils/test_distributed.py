"""Ranks that work apart: whoever is done waits for the others, and learns when one is gone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection

from torch.distributed import TCPStore

from tests.ranks import HOST, Place, run_on_ranks
from utils.distributed import distributed_session
from utils.liveness import LostRankError

TIMEOUT_S = 2.0  # a barrier raises after that


def work_unevenly() -> tuple[float, list[str]]:
    """Seconds until all works were over, and who was still there then."""
    with distributed_session(timeout_s=TIMEOUT_S) as session:
        start = time.monotonic()
        for seconds in ([0.0, 1.5 * TIMEOUT_S], [0.1, 0.0]):
            with session.uneven_work():
                time.sleep(seconds[session.rank])
        return time.monotonic() - start, session.gather(f"rank {session.rank}")


def fail_on_rank_1() -> str:
    with distributed_session(timeout_s=10.0) as session:
        try:
            with session.uneven_work():
                if session.rank == 1:
                    raise ValueError("clip.mp4: torn\nand more")
        except (LostRankError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def kill_rank_1(place: Place, answer: Connection) -> None:
    os.environ.update(place.environment())
    try:
        with distributed_session(timeout_s=TIMEOUT_S) as session, session.uneven_work():
            if session.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
    except LostRankError as error:
        answer.send(str(error))


def test_ranks_wait_for_the_slowest_beyond_the_timeout_of_a_barrier() -> None:
    for seconds, ranks in run_on_ranks(2, work_unevenly):
        assert seconds > 1.5 * TIMEOUT_S
        assert ranks == ["rank 0", "rank 1"]


def test_ranks_that_wait_learn_at_once_which_rank_raised_what() -> None:
    waiting, failing = run_on_ranks(2, fail_on_rank_1)
    assert failing == "ValueError: clip.mp4: torn\nand more"
    assert waiting == "LostRankError: rank 1 stopped: ValueError: clip.mp4: torn"


def test_ranks_that_wait_learn_which_rank_was_killed() -> None:
    context = multiprocessing.get_context("forkserver")
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    here, there = context.Pipe(duplex=False)
    processes = [
        context.Process(target=kill_rank_1, args=(Place(rank, 2, 2, store.port), there))
        for rank in range(2)
    ]
    try:
        for process in processes:
            process.start()
        assert here.poll(60.0), "rank 0 waits for ever"
        told = here.recv()
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert told == (
        "rank 1 has shown no life for 2 s, and was probably killed; run the same command again to "
        "continue"
    )


def test_one_rank_alone_waits_for_nobody() -> None:
    with distributed_session(timeout_s=TIMEOUT_S) as session, session.uneven_work():
        assert session.world_size == 1
