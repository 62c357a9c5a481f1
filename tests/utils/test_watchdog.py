"""A step that does not end: all ranks write where they are, and end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from model.types import Batch, LossOutput
from tests.ranks import lone_ranks
from tests.runs import build
from trainer.phases import Phase
from utils.distributed import Session, distributed_session
from utils.seeding import StepRNG
from utils.watchdog import STACKS, Watchdog, limited

ALONE = Session(rank=0, world_size=1, device=torch.device("cpu"))


def test_work_that_exceeds_its_limit_is_ended_and_its_stacks_are_written(tmp_path: Path) -> None:
    said: list[str] = []
    ended = threading.Event()

    def end(text: str) -> None:
        said.append(text)
        ended.set()

    watchdog = Watchdog(0.1, tmp_path, ALONE, end=end)
    with watchdog.watching(), watchdog.section("step 7"):
        assert ended.wait(30.0)
    stacks = tmp_path / STACKS / "rank_0.txt"
    assert said == [
        "rank 0: step 7 has taken longer than 0.1 s (faults.step_timeout_s); the stacks of all "
        f"ranks are in {tmp_path / STACKS}; run the same command again to continue"
    ]
    assert stacks.read_text().startswith("rank 0: step 7 has taken longer than 0.1 s")
    assert "in test_work_that_exceeds_its_limit" in stacks.read_text()


def test_work_within_its_limit_is_left_alone_and_so_is_time_between_sections(
    tmp_path: Path,
) -> None:
    said: list[str] = []
    watchdog = Watchdog(1.0, tmp_path, ALONE, end=said.append)
    with watchdog.watching():
        for _ in range(5):
            with watchdog.section("step"):
                time.sleep(0.01)
        time.sleep(1.5)
    assert said == []
    assert not (tmp_path / STACKS).exists()


def test_without_a_limit_there_is_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    with limited(None, tmp_path, ALONE) as section, section("step 1"):
        assert threading.active_count() == before


def stuck_in_a_loop() -> None:
    while True:
        time.sleep(0.1)


def train_and_hang(path: Path, logdir: Path, rank: int) -> int:
    with distributed_session(timeout_s=120.0) as session:
        trainer = build(path, logdir, session, "faults.step_timeout_s=3")
        phases = trainer.phases

        def hanging(at: int) -> Iterable[Phase]:
            for one in phases(at):

                def hang(batch: Batch, rng: StepRNG, one: Phase = one) -> LossOutput:
                    if session.rank == rank:
                        stuck_in_a_loop()
                    return one.loss(batch, rng)

                yield Phase(one.name, hang, one.roles)

        trainer.phases = hanging  # type: ignore[method-assign]
        trainer.train()
    return 0


@pytest.mark.slow
def test_a_rank_that_hangs_ends_all_and_every_rank_tells_where_it_was(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    logdir = tmp_path / "run"
    with lone_ranks(2, tmp_path, train_and_hang, configs["diffusion"], logdir, 1) as ranks:
        for rank in ranks:
            rank.join(90.0)
        assert [rank.exitcode for rank in ranks] == [2, 2]
    hung, waiting = ((logdir / STACKS / f"rank_{rank}.txt").read_text() for rank in (1, 0))
    assert "in stuck_in_a_loop" in hung
    assert "in accumulate" in waiting
    assert "step 1 has taken longer than 3 s" in hung
    for rank in (0, 1):
        words = (tmp_path / str(rank)).read_text()
        assert "Thread 0x" in words
        assert "error: rank " in words
