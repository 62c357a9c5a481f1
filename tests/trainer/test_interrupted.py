"""A run that is killed, stopped or poisoned is started again and ends as if nothing had been."""

from __future__ import annotations

import gc
import logging
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from tests.ranks import RankFailedError, run_on_ranks
from tests.runs import assert_same_end, built, cut_after, read_state, run, step_folder, unequal
from trainer import stopping
from trainer.base import Trainer
from trainer.faults import RunFailedError
from trainer.phases import Phase
from utils import checkpoint
from utils.config import ConfigError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of this file's runs."""
    return tmp_path_factory.mktemp("interrupted")


SAVE_ALL = ("steps=5", "save_every=1")
SAVE_LAST = ("steps=5", "save_every=100")  # a run may go on with another interval


@pytest.fixture(scope="module")
def straight(base: Path, configs: dict[str, Path]) -> Path:
    """A diffusion run that nothing happens to, every step saved."""
    return run(configs["diffusion"], base / "straight", *SAVE_ALL)


# ---- killed while saving


class FileOperations:
    """Calls `action(event, path)` before each change of a file below a folder, by audit hook.

    Audit hooks cannot be removed, so this is for processes of their own.
    """

    EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.active = False
        sys.addaudithook(self._audit)

    def action(self, event: str, path: str) -> None:
        raise NotImplementedError

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active or event not in self.EVENTS or threading.current_thread().daemon:
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        path = str(arguments[1] if event == "os.rename" else arguments[0])
        if not path.startswith("/"):  # shutil.rmtree names files relative to an open folder
            path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[-1]}"), path)
        if path.startswith(self.folder):
            self.active = False
            self.action(event, path)
            self.active = True


class Snapshots(FileOperations):
    """Copies the folder before each change: what a kill at that moment would leave."""

    def __init__(self, folder: Path, target: Path) -> None:
        super().__init__(folder)
        self.target = target
        self.taken: list[str] = []

    def action(self, event: str, path: str) -> None:
        shutil.copytree(self.folder, self.target / f"{len(self.taken):03d}")
        self.taken.append(f"{event} {path.removeprefix(self.folder)}")


class Killer(FileOperations):
    """Kills its own process, as kill -9 does, just before one change."""

    def __init__(self, folder: Path, event: str, ending: str) -> None:
        super().__init__(folder)
        self.event, self.ending = event, ending

    def action(self, event: str, path: str) -> None:
        if (event, path.endswith(self.ending)) == (self.event, True):
            os.kill(os.getpid(), signal.SIGKILL)


KEEP_ONE = ("steps=3", "save_every=1", "keep_checkpoints=1")
KEPT = ("steps=3", "save_every=1", "keep_checkpoints=9")


def watch_save(trainer: Trainer, watcher: FileOperations, step: int) -> None:
    """Activate `watcher` for the length of the save of `step`."""
    save = trainer.save

    def watched() -> None:
        assert trainer.saver is not None
        trainer.saver.settle()
        watcher.active = trainer.state.step == step
        save()
        trainer.saver.settle()
        watcher.active = False

    trainer.save = watched  # type: ignore[method-assign]


def train_with_snapshots(path: Path, logdir: Path, target: Path) -> list[str]:
    with built(path, logdir, *KEEP_ONE) as trainer:
        watcher = Snapshots(logdir / "checkpoints", target)
        watch_save(trainer, watcher, step=2)
        trainer.train()
    return watcher.taken


def train_until_killed(path: Path, logdir: Path, event: str, ending: str) -> None:
    with built(path, logdir, *KEEP_ONE) as trainer:
        watch_save(trainer, Killer(logdir / "checkpoints", event, ending), step=2)
        trainer.train()


@pytest.fixture(scope="module")
def kept(base: Path, configs: dict[str, Path]) -> Path:
    """A short DMD run that keeps all its checkpoints, unkilled."""
    return run(configs["dmd"], base / "kept", *KEPT)


def test_before_and_after_each_file_operation_of_a_save_a_whole_checkpoint_is_found(
    kept: Path, configs: dict[str, Path], tmp_path: Path
) -> None:
    operations = run_on_ranks(
        1, train_with_snapshots, configs["dmd"], tmp_path / "run", tmp_path / "snapshots"
    )[0]
    assert len(operations) > 10, operations
    saved = {step: read_state(step_folder(kept, step)) for step in (1, 2)}
    found, proven = [], set()
    for number, operation in enumerate(operations):
        path = checkpoint.latest(tmp_path / "snapshots" / f"{number:03d}")
        assert path is not None, f"nothing to resume from before {operation}"
        found.append(checkpoint.step_of(path))
        content = b"".join(file.read_bytes() for file in sorted(path.iterdir()))
        if content not in proven:
            assert unequal(read_state(path), saved[found[-1]]) == [], f"torn before {operation}"
            proven.add(content)
    assert found == sorted(found), dict(zip(operations, found, strict=True))
    assert set(found) == {1, 2}


@pytest.mark.parametrize(
    ("event", "ending"),
    [
        ("os.mkdir", "step_000002.tmp"),
        ("open", ".distcp"),
        ("open", ".part.json"),
        ("os.rename", "step_000002"),
        ("os.rename", "latest"),
        ("os.rmdir", "step_000001.tmp"),
    ],
)
def test_a_run_killed_within_a_save_resumes_and_ends_as_the_unkilled_run(
    event: str, ending: str, kept: Path, configs: dict[str, Path], tmp_path: Path
) -> None:
    logdir = tmp_path / "run"
    with pytest.raises(RankFailedError) as caught:
        run_on_ranks(1, train_until_killed, configs["dmd"], logdir, event, ending)
    assert caught.value.exitcode == -signal.SIGKILL, caught.value
    run(configs["dmd"], logdir, "steps=3", "keep_checkpoints=1")
    assert_same_end(logdir, kept, 3)
    assert sorted(path.name for path in (logdir / "checkpoints").iterdir()) == [
        "latest",
        "step_000003",
    ]


# ---- stopped by a signal

INTERRUPTIBLE = ("steps=30",)


def main_with_signal(
    arguments: list[str], logdir: Path, sender: int, delay_s: float, number: int = signal.SIGINT
) -> int:
    """train.main(arguments) on this rank; rank `sender` sends itself a signal in mid-run."""

    def interrupt() -> None:
        deadline = time.monotonic() + 60.0
        while not (logdir / "metrics.jsonl").is_file() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(delay_s)
        os.kill(os.getpid(), number)

    if int(os.environ["RANK"]) == sender:
        threading.Thread(target=interrupt, daemon=True).start()
    return train.main(arguments)


def command(path: Path, logdir: Path, overrides: Iterable[str]) -> list[str]:
    return ["--config_path", str(path), "--logdir", str(logdir), "--disable-wandb", *overrides]


@pytest.fixture(scope="module")
def uninterrupted(base: Path, configs: dict[str, Path]) -> Path:
    """A longer run that nobody stops."""
    return run(configs["dmd"], base / "uninterrupted", *INTERRUPTIBLE)


@pytest.mark.parametrize("sample", range(2))
def test_a_run_stopped_by_ctrl_c_exits_130_and_ends_as_the_unstopped_run(
    sample: int, uninterrupted: Path, configs: dict[str, Path], tmp_path: Path
) -> None:
    logdir, delay = tmp_path / "run", random.Random(sample).uniform(0.0, 0.2)
    words = command(configs["dmd"], logdir, INTERRUPTIBLE)
    assert run_on_ranks(1, main_with_signal, words, logdir, 0, delay) == [130]
    stopped_at = checkpoint.latest(logdir / "checkpoints")
    assert stopped_at is not None
    assert 0 < checkpoint.step_of(stopped_at) < 30
    run(configs["dmd"], logdir, *INTERRUPTIBLE)
    assert_same_end(logdir, uninterrupted, 30)


def test_ctrl_c_on_one_of_two_ranks_stops_both_after_the_same_step(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    logdir = tmp_path / "run"
    words = command(configs["diffusion"], logdir, ["steps=400"])
    assert run_on_ranks(2, main_with_signal, words, logdir, 1, 0.1) == [130, 130]
    assert checkpoint.latest(logdir / "checkpoints") is not None


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_cluster_s_signal_to_one_rank_is_the_exit_status_of_both_which_have_saved(
    number: int, status: int, configs: dict[str, Path], tmp_path: Path
) -> None:
    logdir = tmp_path / "run"
    words = command(configs["diffusion"], logdir, ["steps=400"])
    found = run_on_ranks(2, main_with_signal, words, logdir, 1, 0.0, number)
    assert found == [status, status]
    assert checkpoint.latest(logdir / "checkpoints") is not None


def stop_three_times(path: Path, logdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C twice before the third step, and once more while the run ends."""
    monkeypatch.setattr(stopping, "ECHO_S", 0.0)
    with built(path, logdir, *SAVE_ALL) as trainer:
        phases, close = trainer.phases, trainer.parts.batches.close

        def impatient(at: int) -> Iterable[Phase]:
            for _ in range(2 * (at == 2)):  # the second does not wait for the step
                signal.raise_signal(signal.SIGINT)
            return phases(at)

        def closing() -> None:
            close()
            signal.raise_signal(signal.SIGINT)

        trainer.phases = impatient  # type: ignore[method-assign]
        monkeypatch.setattr(trainer.parts.batches, "close", closing)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    monkeypatch.undo()


def test_three_ctrl_c_lose_no_more_than_the_step_and_leave_nothing_locked(
    straight: Path, configs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logdir = tmp_path / "run"
    stop_three_times(configs["diffusion"], logdir, monkeypatch)
    gc.collect()
    assert checkpoint.latest(logdir / "checkpoints") == step_folder(logdir, 2)
    run(configs["diffusion"], logdir, *SAVE_LAST)
    assert_same_end(logdir, straight, 5)


# ---- damaged and poisoned


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_is_resumed(
    straight: Path, configs: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logdir = cut_after(straight, tmp_path / "run", 3)
    shard = step_folder(logdir, 3) / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    with caplog.at_level(logging.INFO):
        run(configs["diffusion"], logdir, *SAVE_LAST)
    size = shard.stat().st_size
    damage = f"{step_folder(logdir, 3)}: __0_0.distcp has {size} bytes, its manifest says"
    assert any(damage in message for message in caplog.messages)
    assert f"resumed {step_folder(logdir, 2)}" in caplog.messages
    assert_same_end(logdir, straight, 5)


def poison_before(trainer: Trainer, step: int) -> None:
    """Make one weight NaN just before `step` trains, as a fault in memory would."""
    phases = trainer.phases

    def poisoned(at: int) -> Iterable[Phase]:
        if at == step:
            with torch.no_grad():
                trainer.roles["generator"].network.model.head.head.weight[0, 0] = float("nan")
        return phases(at)

    trainer.phases = poisoned  # type: ignore[method-assign]


def run_poisoned(path: Path, logdir: Path, step: int, *overrides: str) -> str:
    """What a run says that is poisoned before `step`."""
    with built(path, logdir, *overrides) as trainer:
        poison_before(trainer, step)
        with pytest.raises(RunFailedError) as caught:
            trainer.train()
    message = str(caught.value)
    del trainer, caught
    gc.collect()  # the traceback held the trainer in a cycle; LMDB opens a folder only once
    return message


def test_weights_that_are_not_finite_stop_the_run_and_leave_the_good_checkpoint(
    straight: Path, configs: dict[str, Path], tmp_path: Path
) -> None:
    logdir = tmp_path / "run"
    message = run_poisoned(configs["diffusion"], logdir, 3, *SAVE_ALL)
    assert message.startswith(
        "step 4: roles.generator.head.head.weight not finite; the last good checkpoint is "
        f"{step_folder(logdir, 3)}. Samples of the last one: "
    )
    run(configs["diffusion"], logdir, *SAVE_LAST)
    assert_same_end(logdir, straight, 5)


def test_weights_that_are_not_finite_stop_the_run_before_they_are_logged_or_saved(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    logdir = tmp_path / "run"
    settings = ("steps=8", "log_every=100", "save_every=2")
    assert run_poisoned(configs["diffusion"], logdir, 4, *settings).startswith("step 5: ")
    assert checkpoint.latest(logdir / "checkpoints") == step_folder(logdir, 4)
    state = read_state(step_folder(logdir, 4))
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    assert all(bool(torch.isfinite(value).all()) for value in tensors)


def test_a_log_directory_whose_checkpoints_are_all_damaged_is_not_started_over(
    straight: Path, configs: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(straight, tmp_path / "run")
    for manifest in (tmp_path / "run").rglob("manifest.json"):
        manifest.unlink()
    with pytest.raises(ConfigError, match="all its checkpoints are damaged"):
        run(configs["diffusion"], tmp_path / "run", *SAVE_ALL)
