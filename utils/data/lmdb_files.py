"""LMDB files, whatever they hold: read only if they are whole, and written in one step."""

from __future__ import annotations

import gc
import resource
from collections.abc import Mapping
from pathlib import Path

import lmdb

from utils.errors import UserError

GROWTH = 2  # a full map is reopened this many times larger
FIRST_MAP_BYTES = 64 * 2**20
SPARE_FILES = 512  # for all that is no LMDB


class UnwritableError(UserError, OSError):
    """An LMDB that the disk does not take; LMDB's words tell why."""


def begun(path: Path) -> bool:
    """Whether anything was written; a process that is killed at once leaves an empty file."""
    file = path / "data.mdb"
    return file.is_file() and file.stat().st_size > 0


def allow_open(count: int) -> None:
    """Let this process open `count` files more than it is used to, as far as the system does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = count + SPARE_FILES
    if soft != unlimited and soft < wanted:
        wanted = wanted if hard == unlimited else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def open_to_read(path: Path) -> lmdb.Environment:
    """The LMDB in a folder. Raises ValueError that names the folder if it is none, or cut off."""
    try:
        env = _open_to_read(path)
    except lmdb.Error:
        # LMDB opens a folder once in a process; who had it before may be dropped already, in a
        # circle of references that waits for its collection.
        gc.collect()
        try:
            env = _open_to_read(path)
        except lmdb.Error as error:
            raise UserError(f"{path}: not readable as LMDB: {error}") from error
    # LMDB maps the file into memory: reading past the end of a cut one kills the process.
    size, whole = (path / "data.mdb").stat().st_size, _used_bytes(env)
    if size < whole:
        raise UserError(f"{path}: cut off, data.mdb has {size} of {whole} bytes; copy it again")
    return env


def _open_to_read(path: Path) -> lmdb.Environment:
    return lmdb.open(str(path), readonly=True, lock=False, readahead=False, subdir=True)


def _used_bytes(env: lmdb.Environment) -> int:
    return (env.info()["last_pgno"] + 1) * env.stat()["psize"]


def open_to_write(path: Path) -> lmdb.Environment:
    """The LMDB in a folder, made if there is none, for one process at a time.

    Raises ValueError if what is there is not whole, and OSError if it cannot be written.
    """
    path.mkdir(parents=True, exist_ok=True)
    if begun(path):
        open_to_read(path).close()
    try:
        return lmdb.open(str(path), map_size=FIRST_MAP_BYTES, subdir=True, lock=False)
    except lmdb.Error as error:
        raise _unwritten(str(path), error) from error


def put(env: lmdb.Environment, records: Mapping[bytes, bytes]) -> None:
    """Store all records or, with an OSError that names the folder, none; durable."""
    while not _put(env, records):
        env.set_mapsize(env.info()["map_size"] * GROWTH)


def _put(env: lmdb.Environment, records: Mapping[bytes, bytes]) -> bool:
    try:
        with env.begin(write=True) as transaction:
            for key, value in records.items():
                transaction.put(key, value)
    except lmdb.MapFullError:
        return False
    except lmdb.Error as error:
        raise _unwritten(env.path(), error) from error
    return True


def _unwritten(path: str, error: lmdb.Error) -> UnwritableError:
    return UnwritableError(f"{path}: cannot be written: {error}; is the disk full?")
