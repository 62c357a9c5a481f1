"""A rank that dies in the middle of a step ends the run on all others, which name it."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

import train
from tests.ranks import BEAT_S, lone_ranks
from trainer.base import Trainer
from trainer.phases import Phase
from utils import checkpoint, watch

DEADLY_STEP = 2
HERE = socket.gethostname()
LIMIT_S = 60.0


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def meet_a_bug() -> None:
    raise TypeError("no such thing")


def run_out_of_disk() -> None:
    raise OSError(28, "No space left on device", "full/disk")


def sleep_for_long() -> None:
    time.sleep(2.0 * watch.DEAD_BEATS * BEAT_S)


def train_until(line: list[str], fate: Callable[[], None], own_host: bool) -> int:
    """Train; rank 1 meets its fate within a step, when the others wait for it."""
    rank, accumulate = os.environ["RANK"], Trainer.accumulate
    if own_host:
        socket.gethostname = lambda: f"host-{rank}"

    def fated(self: Trainer, phase: Phase) -> list[dict[str, Tensor]]:
        if rank == "1" and self.state.step == DEADLY_STEP:
            fate()
        return accumulate(self, phase)

    Trainer.accumulate = fated  # type: ignore[method-assign]
    return train.main(line)


def ends(
    fate: Callable[[], None], config: Path, folder: Path, *, own_host: bool = True, world: int = 2
) -> tuple[list[int | None], list[str]]:
    """Exit statuses and last words of ranks; those that never end are None."""
    logdir = folder / "run"
    line = ["--config_path", str(config), "--logdir", str(logdir), "--disable-wandb"]
    line += ["save_in_background=false"]  # so that it is known which one is the last
    line += ["steps=4", "save_every=1", "timeout_s=600", "batch_size=6"]
    with lone_ranks(world, folder, train_until, line, fate, own_host) as processes:
        processes[0].join(LIMIT_S)
        for process in processes[1:]:
            process.join(3.0 if fate is hang else LIMIT_S)
        statuses = [process.exitcode for process in processes]
    texts = [(folder / str(rank)).read_text(encoding="utf-8") for rank in range(world)]
    return statuses, [text.rstrip().rpartition("\n")[2] for text in texts]


def test_of_a_killed_rank_the_others_say_that_it_is_gone_and_the_last_checkpoint_counts(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    statuses, words = ends(be_killed, configs["diffusion"], tmp_path, world=3)
    assert statuses == [2, -signal.SIGKILL, 2], words
    for rank, name in ((0, ""), (2, "rank 2: ")):
        assert words[rank].endswith(
            f"error: {name}rank 1 (host host-1) has shown no life for 0.5 s: killed or stopped, or "
            f"the host is gone; run the same command again to continue"
        )
    saved = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert saved is not None
    # That of the step before may still have been on its way to the disk.
    assert checkpoint.step_of(saved) in (DEADLY_STEP - 1, DEADLY_STEP)


@pytest.mark.slow
def test_of_a_stopped_rank_too_although_no_connection_breaks(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    statuses, words = ends(hang, configs["diffusion"], tmp_path)
    assert statuses == [2, None]
    assert "error: rank 1 (host host-1) has shown no life for 2 s" in words[0]


def test_of_a_rank_that_meets_a_bug_another_host_hears_what_it_was(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    statuses, words = ends(meet_a_bug, configs["diffusion"], tmp_path)
    assert statuses == [2, 1]
    assert words[0].endswith("error: rank 1 (host host-1) failed: TypeError: no such thing")
    assert words[1] == "TypeError: no such thing"


def test_of_a_rank_that_meets_an_error_of_its_users_too(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    statuses, words = ends(run_out_of_disk, configs["diffusion"], tmp_path)
    told = "full/disk: no space left on device; make room, then run the same command again"
    assert statuses == [2, 2]
    assert words[0].endswith(f"error: rank 1 (host host-1) failed: {told}")
    assert words[1].endswith(f"error: rank 1: {told}")


def test_on_the_same_host_it_is_said_once(configs: dict[str, Path], tmp_path: Path) -> None:
    statuses, words = ends(run_out_of_disk, configs["diffusion"], tmp_path, own_host=False)
    assert statuses == [2, 2]
    assert "error" not in words[0]
    assert "error: rank 1: full/disk" in words[1]


@pytest.mark.slow
def test_a_slow_rank_is_waited_for(configs: dict[str, Path], tmp_path: Path) -> None:
    assert ends(sleep_for_long, configs["diffusion"], tmp_path)[0] == [0, 0]


def test_what_is_promised_lies_within_a_minute() -> None:
    looks = watch.DEAD_BEATS + 1  # of the main rank, until it tells
    assert (looks + 1 + 2) * watch.BEAT_S + watch.ANSWER_S <= 60.0
    assert (1 + watch.GRACE_BEATS + 2) * watch.BEAT_S <= 60.0
    assert watch.ASKED_BEATS > watch.URGENT_BEATS + 2
