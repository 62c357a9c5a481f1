"""Saves that are killed, refused, or overtaken by the training that goes on meanwhile."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.ranks import RankFailedError, run_on_ranks
from tests.saves import (
    ALONE,
    EVERY,
    STEPS,
    UNSAVED,
    Faults,
    State,
    advance,
    assert_ends_as_if_nothing_had_been,
    begin,
    claimed,
    forked,
    kill,
    refusable,
    refuse,
    settings,
    straight,
    train,
)
from trainer import saving
from trainer.saving import Saver, read_scores
from utils import checkpoint
from utils.checkpoint import SaveError
from utils.distributed import distributed_session
from utils.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def operations(folder: Path) -> list[str]:
    """All file operations of a run that nothing happens to."""
    log_ = folder / "operations"

    def counted() -> None:
        faults = Faults(folder / "run", lambda n: False, kill)
        train(folder / "run")
        log_.write_text("\n".join(faults.seen))

    assert forked(counted) == 0
    shutil.rmtree(folder / "run")
    return log_.read_text().splitlines()


def spread(count: int, of: int) -> list[int]:
    return [i * (of - 1) // (count - 1) for i in range(count)]


# ---- killed


def kill_at(logdir: Path, number: int) -> int:
    def killed() -> None:
        Faults(logdir, lambda n: n == number, kill)
        train(logdir)

    return forked(killed)


def assert_survives_kills(folder: Path, count: int) -> None:
    done = operations(folder)
    assert len(done) > 60, done
    for number in spread(count, len(done)):
        logdir = folder / f"killed{number}"
        assert kill_at(logdir, number) == -signal.SIGKILL, done[number]
        assert_ends_as_if_nothing_had_been(logdir)
        shutil.rmtree(logdir)


def test_a_run_killed_between_any_two_file_operations_ends_as_the_unkilled_run(
    tmp_path: Path,
) -> None:
    assert_survives_kills(tmp_path, 20)


@pytest.mark.slow
def test_so_does_one_killed_at_each_of_them(tmp_path: Path) -> None:
    assert_survives_kills(tmp_path, 160)


def test_a_run_that_is_killed_again_and_again_ends_as_the_unkilled_run(tmp_path: Path) -> None:
    statuses = [kill_at(tmp_path / "run", number) for number in (40, 55, 33, 70)]
    assert statuses[:3] == 3 * [-signal.SIGKILL]
    assert_ends_as_if_nothing_had_been(tmp_path / "run")


def train_together(logdir: Path, doomed: tuple[int, ...], number: int) -> None:
    """A run on several ranks, of which some are killed at one of their file operations."""
    with distributed_session(timeout_s=60.0) as session:
        if session.rank in doomed:
            Faults(logdir, lambda n: n == number, kill)
        train(logdir, session)


def assert_survives_on_ranks(folder: Path, doomed: tuple[int, ...], number: int) -> None:
    with pytest.raises(RankFailedError):
        run_on_ranks(2, train_together, folder / "run", doomed, number)
    assert_ends_as_if_nothing_had_been(folder / "run")


@pytest.mark.parametrize(("doomed", "number"), [((1,), 4), ((0, 1), 6)])
def test_a_run_of_which_one_rank_or_all_are_killed_in_a_save_ends_as_the_unkilled_run(
    doomed: tuple[int, ...], number: int, tmp_path: Path
) -> None:
    assert_survives_on_ranks(tmp_path, doomed, number)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(0, 40, 2))
@pytest.mark.parametrize("doomed", [(0,), (0, 1)])
def test_so_does_one_killed_at_many_other_moments(
    doomed: tuple[int, ...], number: int, tmp_path: Path
) -> None:
    assert_survives_on_ranks(tmp_path, doomed, number)


# ---- refused by a disk


@pytest.mark.parametrize("more", [0, pytest.param(100, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_for_a_moment_loses_nothing_whatever_it_refuses(
    more: int, tmp_path: Path
) -> None:
    done = operations(tmp_path)
    first = next(i for i, what in enumerate(done) if "checkpoints" in what)
    writes = [i for i, what in enumerate(done) if i < 49 and refusable(what)]
    assert len(writes) > 15, done
    for number in spread(more, len(done)) if more else writes[::3]:
        logdir = tmp_path / f"full{number}"

        def full(number: int = number, logdir: Path = logdir) -> None:
            Faults(logdir, lambda n: n == number, refuse)
            train(logdir)

        assert forked(full) in ((0, UNSAVED) if number >= first else (0, 1)), done[number]
        assert_ends_as_if_nothing_had_been(logdir)


def broken(monkeypatch: pytest.MonkeyPatch, times: int = 10**6) -> None:
    """Let so many saves fail as on a file system that has become read-only."""
    usual, left = Path.mkdir, [times]

    def mkdir(path: Path, *rest: object, **more: object) -> None:
        if path.name.endswith(".tmp"):
            left[0] -= 1
            if left[0] >= 0:
                raise OSError(30, "Read-only file system", str(path))
        usual(path, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", mkdir)


@pytest.mark.parametrize("background", [False, True])
def test_a_run_goes_on_when_a_save_fails_and_the_next_one_makes_good(
    background: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken(monkeypatch, 2)
    with caplog.at_level(logging.WARNING, logger="trainer.saving"):
        train(tmp_path, save_in_background=background)
    told = [r.getMessage() for r in caplog.records if r.name == "trainer.saving"]
    folder = tmp_path / "checkpoints"
    assert told == [
        f"step {step} could not be saved (failure {n} of 3): {folder}/step_00000{step}.tmp: "
        "read-only file system; choose a place where you may do that, or ask for the right"
        for n, step in ((1, 2), (2, 4))
    ]
    assert_ends_as_if_nothing_had_been(tmp_path)


@pytest.mark.parametrize("background", [False, True])
def test_a_run_stops_when_so_many_saves_in_a_row_have_failed_and_keeps_what_it_has(
    background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = claimed(tmp_path)
    saver = Saver(settings(save_failures=2, save_in_background=background), claim, ALONE)
    saver.save(1, begin())
    saver.settle()
    broken(monkeypatch)
    saver.save(2, begin())
    with pytest.raises(SaveError) as caught:
        saver.save(3, begin())
    claim.release()
    good = tmp_path / "checkpoints" / "step_000001"
    assert str(caught.value).splitlines()[0] == (
        "step 3 could not be saved, after 2 attempts in a row (save_failures=2); the newest "
        f"checkpoint is {good}"
    )
    assert checkpoint.problem(good, rank=0) is None
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


def test_the_last_save_of_a_run_must_not_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch)
    with pytest.raises(SaveError, match="read-only file system"):
        train(tmp_path, save_failures=9)


def delete(logdir: Path) -> None:
    shutil.rmtree(logdir)


def delete_checkpoints(logdir: Path) -> None:
    shutil.rmtree(logdir / "checkpoints")


@pytest.mark.parametrize("vanish", [delete, delete_checkpoints])
def test_a_directory_that_is_deleted_in_mid_run_is_made_again(
    vanish: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logdir = tmp_path / "run"
    claim = claimed(logdir)
    saver = Saver(settings(), claim, ALONE)
    saver.save(2, begin())
    saver.settle()
    vanish(logdir)
    with caplog.at_level(logging.WARNING):
        saver.save(4, begin())
        saver.settle(last=True)
    assert checkpoint.latest(logdir / "checkpoints") == logdir / "checkpoints" / "step_000004"
    assert (logdir / "config.yaml").is_file()
    if vanish is delete:
        assert f"{logdir}: was deleted while the run was writing to it" in caplog.text
        assert claim.locks[-1].state().value == "held"
    claim.release()


def test_a_directory_whose_disk_was_unmounted_is_not_made_again_elsewhere(tmp_path: Path) -> None:
    logdir = tmp_path / "disk" / "run"
    claim = claimed(logdir)
    saver = Saver(settings(), claim, ALONE)
    shutil.rmtree(tmp_path / "disk")
    saver.save(2, begin())
    with pytest.raises(SaveError, match="no such file or directory"):
        saver.settle(last=True)
    assert not (tmp_path / "disk").exists()


def test_nothing_is_saved_into_a_directory_that_another_run_has_taken(tmp_path: Path) -> None:
    claim = claimed(tmp_path)
    saver = Saver(settings(), claim, ALONE)
    (tmp_path / "run.lock").unlink()
    (tmp_path / "run.lock").write_text('{"host": "other"}')
    saver.save(2, begin())
    with pytest.raises(SaveError, match="another run has taken it, so nothing is saved there"):
        saver.settle(last=True)
    assert not (tmp_path / "checkpoints").exists()


# ---- in the background


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_saved_in_the_background_is_the_same_in_every_byte(tmp_path: Path) -> None:
    """Although the state moves on at once."""
    ends = []
    for background in (False, True):
        train(tmp_path / "run", save_in_background=background, keep_checkpoints=9)
        found = files(tmp_path / "run" / "checkpoints")
        ends.append(
            {name: data for name, data in found.items() if name[-4:] not in ("json", "yaml")}
        )
        shutil.rmtree(tmp_path / "run")
    assert ends[0] == ends[1]
    assert len([name for name in ends[0] if name.endswith(".distcp")]) == STEPS // EVERY


def test_views_and_strides_are_copied_as_they_are_written(tmp_path: Path) -> None:
    base = torch.arange(60.0).view(3, 4, 5)
    state: State = {"t": base.transpose(0, 2), "part": base[1:, 2], "plain": ["x", 3], "n": 0.5}
    claim = claimed(tmp_path)
    found = []
    for background in (False, True):
        saver = Saver(settings(save_in_background=background), claim, ALONE)
        saver.save(2, state)
        saver.settle(last=True)
        found.append(files(tmp_path / "checkpoints" / "step_000002"))
    claim.release()
    for name in ("__0_0.distcp", ".metadata"):
        assert found[0][name] == found[1][name]


class Gate:
    """Holds a save back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.steps = threading.Event(), list[int]()
        usual = checkpoint.save

        def held(folder: Path, step: int, *rest: object, **more: object) -> Path:
            self.steps.append(step)
            assert self.opened.wait(60.0)
            return usual(folder, step, *rest, **more)  # type: ignore[arg-type]

        monkeypatch.setattr(saving.checkpoint, "save", held)


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_save_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    claim = claimed(tmp_path)
    saver = Saver(settings(), claim, ALONE)
    state = begin()
    saver.save(1, state)  # returns although nothing can be written
    assert checkpoint.latest(saver.folder) is None
    advance(state)
    threading.Timer(0.2, gate.opened.set).start()
    saver.save(2, state)
    assert checkpoint.latest(saver.folder) is not None
    saver.settle(last=True)
    claim.release()
    assert gate.steps == [1, 2]


def test_the_end_of_a_run_waits_for_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    claim = claimed(tmp_path)
    saver = Saver(settings(), claim, ALONE)
    saver.save(1, begin())
    threading.Timer(0.2, gate.opened.set).start()
    saver.close()
    claim.release()
    assert checkpoint.latest(saver.folder) is not None


def test_a_crash_of_the_writer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object, **__: object) -> Path:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(saving.checkpoint, "save", crash)
    claim = claimed(tmp_path)
    saver = Saver(settings(), claim, ALONE)
    saver.save(1, begin())
    with pytest.raises(ZeroDivisionError, match="a bug"):
        saver.settle()
    claim.release()


def test_without_memory_for_a_copy_the_run_waits_for_its_saves_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(saving, "free_bytes", lambda: 100)
    with caplog.at_level(logging.WARNING, logger="trainer.saving"):
        train(tmp_path)
    told = [record.getMessage() for record in caplog.records]
    assert [line.partition(":")[0] for line in told] == ["training waits for each save"]
    assert_ends_as_if_nothing_had_been(tmp_path)


def test_buffers_serve_again(tmp_path: Path) -> None:
    claim = claimed(tmp_path)
    saver = Saver(settings(), claim, ALONE)
    places = []
    for step in (1, 2):
        saver.save(step, begin())
        assert saver._copies is not None
        places.append([v.data_ptr() for v in saver._copies._values.values()])
    saver.settle(last=True)
    claim.release()
    assert places[0] == places[1]


# ---- which stay


def kept(folder: Path, steps: int, **more: object) -> list[int]:
    claim = claimed(folder)
    saver = Saver(settings(**more), claim, ALONE)
    for step in range(1, steps + 1):
        saver.save(step, begin())
    saver.settle(last=True)
    claim.release()
    return [checkpoint.step_of(path) for path in reversed(checkpoint.newest_first(saver.folder))]


def test_the_newest_stay_and_every_so_many(tmp_path: Path) -> None:
    assert kept(tmp_path, 8, keep_checkpoints=2, keep_every=3) == [3, 6, 7, 8]


def test_the_best_by_health_stay(tmp_path: Path) -> None:
    rows = [{"step": 2, "score": 0.9}, {"step": 3, "score": 0.1}, {"step": 5, "score": 0.5}]
    lines = [*map(json.dumps, rows), "{}", "no json", '{"step": 4, "score": NaN}', '{"step": 1}']
    (tmp_path / "health.jsonl").write_text("\n".join(lines))
    assert kept(tmp_path, 7, keep_checkpoints=1, keep_best=1) == [2, 7]


def test_without_a_health_file_none_is_best(tmp_path: Path) -> None:
    assert read_scores(tmp_path / "health.jsonl") == {}
    assert kept(tmp_path, 3, keep_checkpoints=1, keep_best=2) == [3]


def test_a_checkpoint_has_the_score_of_the_newest_probe_until_then() -> None:
    scores = {10: 0.2, 20: 0.8, 30: 0.5}
    assert checkpoint.stay([5, 15, 25, 35], scores, every=0, best=1) == {25}
    assert checkpoint.stay([5, 15, 25, 35], scores, every=5, best=0) == {5, 15, 25, 35}


def test_an_older_checkpoint_stays_until_the_disk_has_given_back_the_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path)
    claim = claimed(tmp_path)
    usual = checkpoint.hash_on_disk

    def damaging(path: Path) -> object:
        if path.suffix == ".distcp":
            data = bytearray(path.read_bytes())
            data[7] ^= 1
            path.write_bytes(bytes(data))
        return usual(path)

    monkeypatch.setattr(checkpoint, "hash_on_disk", damaging)
    saver = Saver(settings(), claim, ALONE)
    saver.save(8, straight())
    with pytest.raises(SaveError, match="the disk gives back other bytes than were written"):
        saver.settle(last=True)
    claim.release()
    assert checkpoint.latest(saver.folder) == saver.folder / f"step_{STEPS:06d}"


def test_old_checkpoints_that_cannot_be_deleted_are_told_and_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: object) -> None:
        raise UserError("not yours")

    monkeypatch.setattr(saving.checkpoint, "prune", refused)
    with caplog.at_level(logging.WARNING, logger="trainer.saving"):
        train(tmp_path)
    assert "old checkpoints could not be deleted: not yours" in caplog.text


def test_a_file_in_the_place_of_a_checkpoint_is_moved_aside_and_a_torn_one_removed(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "step_000002").write_text("mine")
    (folder / "step_000004.tmp").write_text("x" * 100)
    train(tmp_path)
    assert (folder / "step_000002.moved").read_text() == "mine"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["latest", "step_000002.moved", f"step_{STEPS:06d}"]
