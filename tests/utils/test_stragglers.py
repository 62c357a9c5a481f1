"""Ranks that keep the others waiting are named, with what they wait for."""

from __future__ import annotations

import time

import pytest
import torch

from tests.ranks import run_on_ranks
from utils.distributed import Session, distributed_session
from utils.stragglers import Clock, Times, stragglers, tell_stragglers


def times(step: float = 1.0, data: float = 0.0, wait: float = 0.0) -> Times:
    return Times("node1", step, data, wait)


def test_a_rank_that_waits_for_data_is_named() -> None:
    (line,) = stragglers([times(wait=0.4), times(data=0.5), times(wait=0.4)], 1.3)
    assert line == (
        "rank 1 (host node1) waits for data for 0.5 s of a step, the median of all ranks is 0 s; "
        "it takes 1 s, of which it waits 0.5 s for data and 0 s for other ranks"
    )


def test_a_rank_on_which_the_others_wait_is_named() -> None:
    (line,) = stragglers([times(wait=0.5), times(wait=0.5), times(wait=0.1)], 1.3)
    assert line.startswith("rank 2 (host node1) is busy for 0.9 s of a step, the median of all")


@pytest.mark.parametrize(
    "ranks",
    [
        [times(), times(), times()],
        [times(wait=0.2), times(wait=0.1)],  # within 1.3
        [times(data=0.001), times(data=0.04)],  # what costs so little keeps nobody waiting
        [times(data=0.5), times(data=0.5)],  # all alike: no rank's fault
    ],
)
def test_ranks_that_are_alike_are_not_named(ranks: list[Times]) -> None:
    assert stragglers(ranks, 1.3) == []


def test_times_are_per_step_and_begin_anew() -> None:
    clock = Clock()
    with clock.measured("data"):
        time.sleep(0.02)
    first, second = clock.read(0.5, steps=2), clock.read(0.5, steps=2)
    assert first.data >= 0.01
    assert (second.step, second.data, second.wait) == (0.5, 0.0, 0.0)


def slow_data() -> list[str]:
    lines: list[str] = []
    with distributed_session(timeout_s=60.0) as session:
        clock = Clock()
        with clock.measured("data"):
            time.sleep(0.3 * session.rank)
        gathered = session.gather(clock.read(0.4, steps=1))
        tell_stragglers(session, gathered[session.rank], 1.3)
        lines = stragglers(gathered, 1.3)
    return lines


def test_of_two_ranks_the_slow_one_is_named_on_both() -> None:
    first, second = run_on_ranks(2, slow_data)
    assert first == second
    assert len(first) == 1
    assert first[0].startswith("rank 1 (host ")


def test_one_rank_keeps_nobody_waiting(caplog: pytest.LogCaptureFixture) -> None:
    tell_stragglers(Session(0, 1, torch.device("cpu")), times(data=0.9), 1.3)
    assert caplog.messages == []
