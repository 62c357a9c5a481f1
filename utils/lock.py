"""A lock on a folder: held by one process, gone with it, and it tells who has it.

The system's own lock on a file ends with its process, however that ends, and most file systems of
networks keep it across hosts. Where one does not, a sign of life every few seconds tells.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
import weakref
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

from utils.errors import UserError

log = logging.getLogger(__name__)

FILE = "run.lock"
BEAT_S = 10.0  # between two signs of life
STALE_S = 60.0  # without one, a holder on another host is taken for dead
GRACE_S = 2.0  # how long a holder that is about to end is waited for
LOOK_S = 0.1  # between two looks


class LockedError(UserError):
    """Another process has the folder."""


class State(Enum):
    """How a lock stands that was taken."""

    HELD = "held"
    GONE = "gone"  # the folder, or the file in it, was deleted
    FOREIGN = "foreign"  # another process has it


@dataclass(frozen=True)
class Holder:
    """Who has a folder, as its file says."""

    host: str
    pid: int
    since: str
    token: str  # of this lock alone

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}, since {self.since}"


class FolderLock:
    """Begun by `take`, told to others by `sign`, ended by `release` or with the process."""

    def __init__(self, folder: Path, handle: int) -> None:
        self.folder = folder
        self.holder = Holder(
            socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"), uuid.uuid4().hex
        )
        self._handle = handle
        self._over = threading.Event()
        self._guard = threading.RLock()
        self._end = weakref.finalize(
            self, _end, folder / FILE, handle, self.holder, self._over, self._guard
        )

    @classmethod
    def take(cls, folder: Path) -> FolderLock:
        """Lock a folder that is there. Raises LockedError, with who has it, if another does."""
        path, until = folder / FILE, time.monotonic() + GRACE_S
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                free = _lock(handle)
                if free is not False and _is(handle, path):
                    _wait_for_others_end(path, folder, handle, locked=free is True)
                    return cls(folder, handle)
                if free is False and time.monotonic() > until:
                    raise LockedError(_refusal(folder, _read(handle)))
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)
            time.sleep(LOOK_S)

    def sign(self) -> None:
        """Write who has the folder, and show from now on that it lives."""
        text = json.dumps(asdict(self.holder)).encode()
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, text, 0)
        beat = threading.Thread(
            target=_beat, args=(self._handle, self._over, self._guard), daemon=True
        )
        beat.start()

    def state(self) -> State:
        """Whether the folder is still this process's."""
        if self._over.is_set() or not _is(self._handle, self.folder / FILE):
            return State.FOREIGN if (self.folder / FILE).exists() else State.GONE
        holder = _read(self._handle)
        return State.HELD if holder == self.holder else State.FOREIGN

    def release(self) -> None:
        """Give the folder back."""
        self._end()


def _end(
    path: Path, handle: int, holder: Holder, over: threading.Event, guard: threading.RLock
) -> None:
    if holder.pid != os.getpid():  # a fork of the process that holds it
        return
    over.set()
    with guard, suppress(OSError):
        own = _read(handle) in (holder, None) and _is(handle, path)
        if own:
            path.unlink(missing_ok=True)
        os.close(handle)


def _beat(handle: int, over: threading.Event, guard: threading.RLock) -> None:
    while not over.wait(BEAT_S):
        with guard, suppress(OSError):
            if not over.is_set():
                os.utime(handle)


def _lock(handle: int) -> bool | None:
    """True: locked; False: another process has it; None: the file system has no locks."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def _is(handle: int, path: Path) -> bool:
    """Whether an open file is the one that lies at `path` now."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _read(handle: int) -> Holder | None:
    """Who signed the file; None = nobody, or it was cut."""
    try:
        return Holder(**json.loads(os.pread(handle, 2**16, 0)))
    except (ValueError, TypeError):
        return None


def _wait_for_others_end(path: Path, folder: Path, handle: int, *, locked: bool) -> None:
    """Return when whoever signed the file is surely gone. Raises LockedError if it lives."""
    holder = _read(handle)
    if holder is None or (locked and holder.host == socket.gethostname()):
        return  # the system has taken the lock from a process of this host that ended
    if holder.pid == os.getpid() and holder.host == socket.gethostname():
        return
    seen = os.fstat(handle).st_mtime_ns
    left_s = STALE_S - (_server_time(folder) - seen / 1e9)
    if left_s > 0:
        log.warning("%s: waiting up to %.0f s for a sign of life of %s", folder, left_s, holder)
    until = time.monotonic() + left_s
    while time.monotonic() < until:
        time.sleep(min(1.0, STALE_S / 10))
        with path.open("rb") as file:  # opened anew, so that other hosts' news is seen
            if os.fstat(file.fileno()).st_mtime_ns != seen:
                raise LockedError(_refusal(folder, holder))
    if locked and _lock(handle) is False:  # a process's locks go with the first handle it closes
        raise LockedError(_refusal(folder, _read(handle)))


def _server_time(folder: Path) -> float:
    """The time by the clock that stamps files of `folder`."""
    mark = folder / f".{uuid.uuid4().hex}.0.part"
    try:
        mark.touch()
        return mark.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        mark.unlink(missing_ok=True)


def _refusal(folder: Path, holder: Holder | None) -> str:
    who = "a process that is just starting" if holder is None else str(holder)
    return (
        f"{folder}: another run writes to it ({who}); wait for its end, stop it, or use another "
        f"--logdir"
    )
