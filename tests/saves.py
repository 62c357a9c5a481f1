"""A run in miniature that saves through the real parts, and faults at its file operations."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.runs import read_state
from trainer.config import Config
from trainer.fingerprint import Fingerprint
from trainer.logdir import Claim, find_checkpoint, lock_logdir
from trainer.saving import Saver
from utils import checkpoint, checkpoint_writer
from utils.checkpoint import SaveError
from utils.distributed import Session
from utils.seeding import generator

ALONE = Session(rank=0, world_size=1, device=torch.device("cpu"))
STEPS, EVERY = 6, 2
UNSAVED = 3  # exit status of a run whose last save failed
PRINT = Fingerprint(records=1, captions="c", tensors="t", weights={})

State = dict[str, Any]


def settings(**more: Any) -> Config:
    """The configuration of a miniature run."""
    usual = {"trainer": "diffusion", "steps": STEPS, "batch_size": 1, "keep_checkpoints": 1}
    return Config(**{**usual, **more})  # type: ignore[arg-type]


def begin() -> State:
    """The state of a run that has made no step."""
    values = {f"layer{i}": torch.randn(40 + i, generator=generator("run", i)) for i in range(4)}
    return {"weights": values, "state": {"step": torch.tensor(0)}}


def advance(state: State) -> None:
    """One step, in place, as optimizers work."""
    step = int(state["state"]["step"])
    for weight in state["weights"].values():
        weight.mul_(0.5).add_(torch.randn(weight.shape, generator=generator("step", step)))
    state["state"]["step"] += 1


def claimed(logdir: Path, session: Session = ALONE) -> Claim:
    """The log directory as a run takes it."""
    locks: list[Any] = []
    session.on_main(lambda: locks.append(lock_logdir(logdir)))
    try:
        found = find_checkpoint(logdir, session)
    except BaseException:
        for lock in locks:
            lock.release()
        raise
    claim = Claim(logdir, {"config.yaml": "steps: 6\n"}, PRINT, found, locks)
    session.on_main(claim.write)
    return claim


def train(logdir: Path, session: Session = ALONE, **more: Any) -> State:
    """Go on from the newest checkpoint to the end, saving every other step."""
    claim = claimed(logdir, session)
    saver = Saver(settings(**more), claim, session)
    state = begin()
    try:
        if claim.resume_from is not None:
            checkpoint.load(claim.resume_from, state)
        while int(state["state"]["step"]) < STEPS:
            advance(state)
            if int(state["state"]["step"]) % EVERY == 0:
                saver.save(int(state["state"]["step"]), state)
        saver.settle(last=True)
    finally:
        saver.close()
        claim.release()
    return state


def straight() -> State:
    """Where a run ends that nothing happens to."""
    state = begin()
    for _ in range(STEPS):
        advance(state)
    return state


def assert_ends_as_if_nothing_had_been(logdir: Path, **more: Any) -> None:
    """A further start of the run goes on to the very same bits."""
    before = last_whole(logdir)
    claim = claimed(logdir)
    found = 0 if claim.resume_from is None else checkpoint.step_of(claim.resume_from)
    claim.release()
    assert found >= before
    train(logdir, **more)
    expected = straight()
    for state in (read_state(logdir / "checkpoints" / f"step_{STEPS:06d}"),):
        for name, weight in expected["weights"].items():
            assert torch.equal(state[f"weights.{name}"], weight), name
        assert int(state["state.step"]) == STEPS
    names = sorted(path.name for path in (logdir / "checkpoints").iterdir())
    assert not [name for name in names if not name.startswith(("latest", "step_")) or "." in name]
    if before < STEPS:  # else nothing was left to do, and to delete
        assert names == ["latest", f"step_{STEPS:06d}"], names


def last_whole(logdir: Path) -> int:
    """The newest step that lies there under its name, whole."""
    folder = logdir / "checkpoints"
    whole = [p for p in checkpoint.newest_first(folder) if checkpoint.problem(p, rank=0) is None]
    return checkpoint.step_of(whole[0]) if whole else 0


class Faults:
    """Counts changes of files below a folder; calls `act(what)` just before those of `at`."""

    AUDITED = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")

    def __init__(self, folder: Path, at: Callable[[int], bool], act: Callable[[str], None]) -> None:
        self.folder, self.at, self.act = str(folder), at, act
        self.seen: list[str] = []
        sys.addaudithook(self._audit)
        for module, name in ((os, "fsync"), (os, "pwrite"), (os, "ftruncate")):
            self._watch(module, name)
        self._watch(checkpoint_writer._Hashed, "write")

    def _watch(self, owner: Any, name: str) -> None:
        usual = getattr(owner, name)

        def watched(*arguments: Any) -> Any:
            self._happens(name)
            return usual(*arguments)

        setattr(owner, name, watched)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in self.AUDITED:
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        path = str(arguments[1] if event == "os.rename" else arguments[0])
        if not path.startswith("/"):  # shutil.rmtree names files relative to an open folder
            path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[-1]}"), path)
        if path.startswith(self.folder):
            self._happens(f"{event} {path.removeprefix(self.folder)}")

    def _happens(self, what: str) -> None:
        if threading.current_thread().daemon:
            return
        self.seen.append(what)
        if self.at(len(self.seen) - 1):
            self.act(what)


def kill(what: str) -> None:
    """End this process as kill -9 does."""
    del what
    os.kill(os.getpid(), signal.SIGKILL)


def refusable(what: str) -> bool:
    """Whether an operation needs room on a disk; renaming and deleting work without."""
    return what in ("write", "pwrite", "fsync") or what.startswith(("open", "os.mkdir"))


def refuse(what: str) -> None:
    """What a full disk says to a write."""
    if refusable(what):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def forked(function: Callable[[], object]) -> int:
    """Call it in a fork of this process; returns the status, negative = the signal's number."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            function()
            status = 0
        except SaveError:
            status = UNSAVED
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
