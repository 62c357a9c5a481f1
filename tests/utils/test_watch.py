"""A rank that is gone, or fails, ends those that wait for it, who name it; a slow one does not."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from torch.distributed import HashStore, TCPStore

from tests.commands import main_and_stderr
from tests.ranks import BEAT_S, HOST, lone_ranks, run_on_ranks
from utils import board, watch
from utils.board import Loss, meet
from utils.cli import fail
from utils.distributed import Launch, Session, distributed_session
from utils.errors import UserError
from utils.watch import STORE_GONE, Stillness

DEAD_S = watch.DEAD_BEATS * BEAT_S
HERE = socket.gethostname()


def in_session(body: Callable[[Session], None]) -> int:
    """What a rank of these tests does."""
    with distributed_session(timeout_s=600.0) as session:
        session.barrier()
        body(session)
    return 0


@contextmanager
def ranks(
    world: int, folder: Path, body: Callable[[Session], None], store: TCPStore | None = None
) -> Iterator[list[BaseProcess]]:
    """Ranks that run `body` within a process group; what they say lies in <folder>/<rank>."""
    with lone_ranks(world, folder, in_session, body, store=store) as processes:
        yield processes


def end(process: BaseProcess) -> int | None:
    """The exit status of a rank that must end now."""
    process.join(60.0)
    return process.exitcode


def hang(session: Session) -> None:
    """Wait without a connection that could break, as for a kernel that never ends."""
    if (session.rank, session.world_size) == (1, 3):
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()


def stand_still(session: Session) -> None:
    if session.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    threading.Event().wait()


def lose_the_first(session: Session) -> None:
    if session.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()


def fail_alone(session: Session) -> None:
    if session.rank == 1:
        raise TypeError("no such thing\nas this")
    threading.Event().wait()


def compute_for_long(session: Session) -> None:
    """Keep the interpreter busy for longer than a dead rank is waited for."""
    until = time.monotonic() + 1.5 * DEAD_S
    while session.rank == 1 and time.monotonic() < until:
        sum(range(1000))
    session.barrier()


def lost(rank: int) -> str:
    return (
        f"rank {rank} (host {HERE}) has shown no life for 2 s: killed or stopped, or the host is "
        f"gone; run the same command again to continue\n"
    )


def said(folder: Path, rank: int) -> str:
    return (folder / str(rank)).read_text(encoding="utf-8")


def test_all_ranks_that_wait_for_a_killed_one_end_and_name_it(tmp_path: Path) -> None:
    with ranks(3, tmp_path, hang) as processes:
        assert [end(processes[rank]) for rank in (1, 0, 2)] == [-signal.SIGKILL, 2, 2]
    for rank, name in ((0, ""), (2, "rank 2: ")):
        assert said(tmp_path, rank) == f"\nerror: {name}{lost(1)}"


def test_a_stopped_rank_is_named_too(tmp_path: Path) -> None:
    with ranks(2, tmp_path, stand_still) as processes:
        assert end(processes[0]) == 2
    assert said(tmp_path, 0) == f"\nerror: {lost(1)}"


def test_a_main_rank_that_is_killed_is_named_by_the_others(tmp_path: Path) -> None:
    with ranks(3, tmp_path, lose_the_first) as processes:
        assert [end(process) for process in processes] == [-signal.SIGKILL, 2, 2]
    assert said(tmp_path, 1) == f"\nerror: rank 1: {lost(0)}"


def test_a_rank_that_fails_ends_those_that_wait_without_a_connection(tmp_path: Path) -> None:
    with ranks(2, tmp_path, fail_alone) as processes:
        assert [end(process) for process in processes] == [2, 1]
    assert "TypeError: no such thing" in said(tmp_path, 1)
    assert said(tmp_path, 0) == ""  # one host: rank 1 has said it


def test_a_rank_that_is_only_slow_is_waited_for(tmp_path: Path) -> None:
    with ranks(2, tmp_path, compute_for_long) as processes:
        assert [end(process) for process in processes] == [0, 0]
    assert [said(tmp_path, rank) for rank in range(2)] == ["", ""]


def test_ranks_whose_store_is_gone_end_and_say_so(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe()
    host = context.Process(target=keep_store, args=(there,))
    host.start()
    port = here.recv()
    with ranks(2, tmp_path, stand_by, TCPStore(HOST, port, is_master=False)) as processes:
        while not all((tmp_path / f"{rank}").is_file() for rank in range(2)):
            time.sleep(0.05)
        time.sleep(2.0)
        host.kill()
        assert [end(process) for process in processes] == [2, 2]
    for rank, name in ((0, ""), (1, "rank 1: ")):
        assert said(tmp_path, rank).endswith(f"error: {name}{STORE_GONE}\n")


def hosted_by_rank_0(port: int) -> int:
    """Rank 0 holds the store, as where torchrun shares none; it fails when rank 1 waits for it."""
    rank = os.environ["RANK"]
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(port)}
    socket.gethostname = lambda: f"host-{rank}"
    with distributed_session(timeout_s=600.0) as session:
        session.barrier()
        if session.rank == 0:
            raise TypeError("no such thing")
        threading.Event().wait()
    return 0


def test_a_main_rank_that_holds_the_store_and_fails_stays_until_the_others_know_why(
    tmp_path: Path,
) -> None:
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    with lone_ranks(2, tmp_path, hosted_by_rank_0, port) as processes:
        assert [end(process) for process in processes] == [1, 2]
    told = "rank 0 (host host-0) failed: TypeError: no such thing"
    assert said(tmp_path, 1).endswith(f"\nerror: rank 1: {told}\n")  # torch speaks too


def keep_store(answer: multiprocessing.connection.Connection) -> None:
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    answer.send(store.port)
    threading.Event().wait()


def stand_by(session: Session) -> None:
    del session
    threading.Event().wait()


# ---- by itself


def test_a_host_hears_of_a_loss_once_and_not_of_what_one_of_its_ranks_has_told() -> None:
    loss = Loss([0], ["a"], "gone")
    places = [(1, 1), (2, 2), (8, 0), (9, 1)]  # rank and local rank
    assert [place for place in places if loss.told_by(*place)] == [(1, 1), (8, 0)]
    assert not Loss([3], [HERE], "failed", told=True).told_by(0, 0)
    assert Loss([3], ["other"], "failed", told=True).told_by(0, 0)


def test_whoever_looks_rarely_does_not_find_the_others_dead() -> None:
    still = Stillness(2)
    still.look(["0", "0"])
    for beat in range(3):
        still.look([str(beat), "0"])
    assert still.longer_than(2) == [1]
    still.look(["3", board.DONE])
    assert still.longer_than(0) == []


def rounds() -> list[str]:
    """What this rank's boards are called in two starts over one store; what the first one left."""
    names = []
    launch = Launch.here()
    store = TCPStore(HOST, int(os.environ["MASTER_PORT"]), is_master=False)
    for world in (2, 2, 1):
        if launch.rank < world:
            here = meet(store, launch.rank, world, 20.0)
            names.append(here.prefix)
            assert here.failure() is None, "a former start's failure counts"
            store.barrier(f"read {here.prefix}", world)
            if launch.rank == 1:
                here.fail(1, "done with")
            store.barrier(f"after {here.prefix}", world)
    return names


def test_each_start_over_a_kept_store_has_a_board_of_its_own() -> None:
    first, second = run_on_ranks(2, rounds)
    assert first[:2] == second
    assert len(set(first)) == 3


def fail_before_meeting() -> tuple[int, str]:
    """Rank 1 finds its configuration at fault, before any process group."""
    board.FAILED_S = 0.2

    def command(_: object) -> int:
        if Launch.here().rank == 1:
            return fail(UserError("a: unknown key\nb: unknown key"))
        try:
            with distributed_session(timeout_s=60.0):
                raise AssertionError("rank 1 came")
        except SystemExit as stop:
            return int(str(stop.code))

    return main_and_stderr(command, [])


def test_ranks_do_not_wait_for_one_that_failed_before_they_met() -> None:
    """What the others say, on another host, is written to the file descriptor."""
    answers = run_on_ranks(3, fail_before_meeting)
    assert [status for status, _ in answers] == [2, 2, 2]
    told = "error: rank 1: a: unknown key\nerror: rank 1: b: unknown key\n"
    assert [text for _, text in answers] == ["", told, ""]


def test_a_rank_that_never_comes_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"ranks \[1\] did not come within 0.05 s"):
        meet(HashStore(), 0, 2, 0.05)
