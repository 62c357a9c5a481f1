"""Whose a log directory is: one run's at a time, gone on with, never begun again in silence."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

import train
from tests.commands import ROOT, own_logging, refusal
from tests.runs import assert_same_end, cut_after, rows, run, step_folder
from utils import lock
from utils.lock import FolderLock
from utils.metrics import JsonLines

__all__ = ["own_logging"]

SHORT = ("steps=3", "save_every=1", "batch_size=2")


@pytest.fixture(scope="module")
def config(configs: dict[str, Path]) -> Path:
    return configs["diffusion"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, config: Path) -> Path:
    """A run of three steps, each saved. Do not write into it."""
    return run(config, tmp_path_factory.mktemp("logdir") / "run", *SHORT)


def words(config: Path, logdir: Path, *more: str) -> list[str]:
    return ["--config_path", str(config), "--logdir", str(logdir), "--disable-wandb", *more]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def test_a_newest_checkpoint_with_one_wrong_bit_is_named_and_the_one_before_it_is_resumed(
    done: Path, config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logdir = cut_after(done, tmp_path / "run", 2)
    flip(step_folder(logdir, 2) / "__0_0.distcp")
    with caplog.at_level(logging.INFO):
        run(config, logdir, *SHORT)
    assert f"resumed {step_folder(logdir, 1)}" in caplog.messages
    damage = f"{step_folder(logdir, 2)}: the content of __0_0.distcp is not what was saved"
    assert any(damage in message for message in caplog.messages)
    assert any("goes on from step 1, the newest that is left" in m for m in caplog.messages)
    assert_same_end(logdir, done, 3)


def test_an_emptied_folder_of_checkpoints_is_no_start_and_nothing_is_cut(
    done: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logdir = Path(shutil.copytree(done, tmp_path / "run"))
    shutil.rmtree(logdir / "checkpoints")
    (logdir / "checkpoints").mkdir()
    before = {p.name: p.read_bytes() for p in logdir.iterdir() if p.is_file()}
    told = refusal(train.main, words(config, logdir, *SHORT, "log_every=2"), capsys)
    assert told == (
        f"{logdir}/checkpoints: holds no checkpoint, but the run had saved step 3; restore the "
        f"folder or use a new --logdir; to begin it again from nothing, delete "
        f"{logdir}/last_save.json"
    )
    assert {p.name: p.read_bytes() for p in logdir.iterdir() if p.is_file()} == before
    (logdir / "last_save.json").unlink()
    run(config, logdir, *SHORT)
    assert_same_end(logdir, done, 3)


def test_a_run_that_was_killed_before_its_first_save_begins_again(
    done: Path, config: Path, tmp_path: Path
) -> None:
    logdir = Path(shutil.copytree(done, tmp_path / "run"))
    shutil.rmtree(logdir / "checkpoints")
    (logdir / "last_save.json").unlink()
    (logdir / "checkpoints" / "step_000001.tmp").mkdir(parents=True)
    run(config, logdir, *SHORT)
    assert_same_end(logdir, done, 3)


def test_fresh_refuses_to_overwrite_a_run_and_begins_one_elsewhere(
    done: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refusal(train.main, words(config, done, *SHORT, "--fresh"), capsys)
    assert told == (
        f"--fresh: {done} holds a run already, which would be overwritten; use a new --logdir, or "
        f"leave --fresh away to continue that run"
    )
    assert train.main(words(config, tmp_path / "new", *SHORT, "--fresh")) == 0
    assert_same_end(tmp_path / "new", done, 3)


def test_a_second_run_is_refused_while_the_first_lives_and_changes_nothing(
    done: Path,
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lock, "GRACE_S", 0.1)
    logdir = Path(shutil.copytree(done, tmp_path / "run"))
    child = os.fork()
    if child == 0:
        held = FolderLock.take(logdir)
        held.sign()
        (tmp_path / "ready").touch()
        signal.pause()
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    before = (logdir / "config.yaml").read_bytes()
    try:
        told = refusal(train.main, words(config, logdir, *SHORT, "steps=9", "save_every=2"), capsys)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    who = f"process {child} on host {socket.gethostname()}, since "
    assert told.startswith(f"{logdir}: another run writes to it ({who}")
    assert (logdir / "config.yaml").read_bytes() == before
    assert train.main(words(config, logdir, *SHORT)) == 0


def test_what_torn_saves_left_is_removed_before_anything_is_written(
    done: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logdir = cut_after(done, tmp_path / "run", 2)
    torn = logdir / "checkpoints" / "step_000003.tmp"
    shutil.copytree(step_folder(done, 3), torn)
    (logdir / ".config.yaml.5000017.part.yaml").write_text("x")
    seen: list[list[str]] = []
    sign = FolderLock.sign

    def signed(self: FolderLock) -> None:
        seen.append([p.name for p in logdir.rglob("*") if ".tmp" in p.name or ".part" in p.name])
        sign(self)

    monkeypatch.setattr(FolderLock, "sign", signed)
    run(config, logdir, *SHORT)
    assert seen == [[]]
    assert_same_end(logdir, done, 3)


def test_a_bad_line_of_the_metrics_does_not_keep_a_run_from_going_on(
    done: Path, config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logdir = cut_after(done, tmp_path / "run", 2)
    path = logdir / "metrics.jsonl"
    path.write_bytes(b"{}\n\xff\xfe\x00\n" + path.read_bytes())
    with caplog.at_level(logging.WARNING, logger="utils.metrics"):
        run(config, logdir, *SHORT)
    assert f"{path}: 2 lines are no metrics, and are removed" in caplog.messages
    assert_same_end(logdir, done, 3)


def test_a_run_whose_directory_is_deleted_goes_on_and_ends(
    done: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logdir = tmp_path / "run"
    monkeypatch.setattr(JsonLines, "log", deleting(logdir))
    assert train.main(words(config, logdir, *SHORT)) == 0
    assert [row["step"] for row in rows(logdir)] == [2, 3]
    assert json.loads((logdir / "last_save.json").read_text()) == {"step": 3}
    assert (step_folder(logdir, 3) / "__0_0.distcp").read_bytes() == (
        step_folder(done, 3) / "__0_0.distcp"
    ).read_bytes()


def deleting(logdir: Path) -> Callable[[JsonLines, int, Mapping[str, float]], None]:
    """What logs metrics, and deletes the directory before those of step 2."""
    usual = JsonLines.log

    def log(self: JsonLines, step: int, values: Mapping[str, float]) -> None:
        if step == 2:
            # Renamed first: a save that is being written would fill it again.
            shutil.rmtree(logdir.rename(logdir.with_name("deleted")))
        usual(self, step, values)

    return log


# ---- the launcher

RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def alive(pids: list[int]) -> list[int]:
    """Those that still run; zombies do not."""
    running = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            running.append(pid)
    return running


@pytest.mark.slow
def test_ranks_end_when_their_launcher_is_killed_and_the_next_start_goes_on(
    config: Path, tmp_path: Path
) -> None:
    logdir = tmp_path / "run"
    line = [*RANKS, str(ROOT / "train.py"), *words(config, logdir, "steps=100000", "save_every=5")]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, *line], env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=said
        )
        until = time.monotonic() + 200.0
        while not (logdir / "last_save.json").is_file() and time.monotonic() < until:
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ranks = [int(pid) for pid in children]
        assert len(alive(ranks)) == 2
        process.kill()
        process.wait()
    until = time.monotonic() + 60.0
    while alive(ranks) and time.monotonic() < until:
        time.sleep(0.05)
    assert alive(ranks) == [], (tmp_path / "said").read_text()
    saved = json.loads((logdir / "last_save.json").read_text())["step"]
    assert not (logdir / "run.lock").exists()
    assert train.main(words(config, logdir, f"steps={saved + 1}")) == 0
    assert rows(logdir)[-1]["step"] == saved + 1
