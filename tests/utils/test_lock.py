"""A folder that one process has: others are refused, and a crash gives it back."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from utils import lock as module
from utils.lock import FILE, FolderLock, LockedError, State


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("GRACE_S", 0.2), ("STALE_S", 0.5), ("BEAT_S", 0.05), ("LOOK_S", 0.02)):
        monkeypatch.setattr(module, name, value)


def take(folder: Path) -> FolderLock:
    held = FolderLock.take(folder)
    held.sign()
    return held


@contextmanager
def holder(folder: Path) -> Iterator[int]:
    """Another process that has the folder, until it is killed."""
    child = os.fork()
    if child == 0:
        held = take(folder)
        (folder / "ready").touch()
        signal.pause()
        del held
        os._exit(0)
    try:
        while not (folder / "ready").exists():
            time.sleep(0.01)
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_second_process_is_refused_and_told_who_has_it_since_when(tmp_path: Path) -> None:
    with holder(tmp_path) as pid:
        since = json.loads((tmp_path / FILE).read_text())["since"]
        with pytest.raises(LockedError) as caught:
            take(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: another run writes to it (process {pid} on host {socket.gethostname()}, "
        f"since {since}); wait for its end, stop it, or use another --logdir"
    )


def test_a_killed_process_gives_it_back_at_once(tmp_path: Path) -> None:
    with holder(tmp_path):
        pass
    assert (tmp_path / FILE).exists()
    held = take(tmp_path)
    assert held.state() is State.HELD
    assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
    held.release()


def test_a_process_that_is_about_to_end_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GRACE_S", 20.0)
    with holder(tmp_path) as pid:
        threading.Timer(0.2, os.kill, (pid, signal.SIGKILL)).start()
        take(tmp_path).release()


def test_a_released_folder_is_as_it_was(tmp_path: Path) -> None:
    take(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_nobody_refers_to_any_more_is_released(tmp_path: Path) -> None:
    held = take(tmp_path)
    del held
    assert list(tmp_path.iterdir()) == []


def other_host(folder: Path) -> None:
    """What a run on another host leaves that was killed."""
    text = {"host": "elsewhere", "pid": 7, "since": "yesterday", "token": "t"}
    (folder / FILE).write_text(json.dumps(text))


def test_a_run_on_another_host_that_gives_no_sign_of_life_is_taken_for_dead(tmp_path: Path) -> None:
    other_host(tmp_path)
    held = take(tmp_path)
    assert held.state() is State.HELD
    held.release()


def test_where_files_have_no_locks_across_hosts_a_sign_of_life_protects(tmp_path: Path) -> None:
    other_host(tmp_path)
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.05):
            os.utime(tmp_path / FILE)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(LockedError, match=r"process 7 on host elsewhere, since yesterday"):
        take(tmp_path)
    over.set()
    thread.join()


def test_a_file_system_without_locks_is_protected_by_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    with holder(tmp_path) as pid, pytest.raises(LockedError, match=f"process {pid} on host"):
        take(tmp_path)
    take(tmp_path).release()


def test_a_holder_shows_that_it_lives(tmp_path: Path) -> None:
    held = take(tmp_path)
    os.utime(tmp_path / FILE, (0, 0))
    until = time.monotonic() + 20.0
    while (tmp_path / FILE).stat().st_mtime == 0.0 and time.monotonic() < until:
        time.sleep(0.02)
    assert (tmp_path / FILE).stat().st_mtime > 0.0
    held.release()


def test_a_lock_whose_file_is_gone_or_anothers_says_so(tmp_path: Path) -> None:
    held = take(tmp_path)
    (tmp_path / FILE).unlink()
    assert held.state() is State.GONE
    other_host(tmp_path)
    assert held.state() is State.FOREIGN
    held.release()
    assert (tmp_path / FILE).exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 3}', "\x00\x01"])
def test_a_file_that_a_crash_has_cut_is_nobodys(text: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(text)
    take(tmp_path).release()
