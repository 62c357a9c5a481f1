"""LMDB files, whatever they hold: written in one step, and only if what is there is whole."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from pathlib import Path

import lmdb

from utils.data.lmdb_reading import LmdbReader
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


def open_to_write(path: Path) -> lmdb.Environment:
    """The LMDB in a folder, made if there is none, for one process at a time.

    Raises ValueError if what is there is not whole, and OSError if it cannot be written.
    """
    path.mkdir(parents=True, exist_ok=True)
    if begun(path):
        LmdbReader(path).close()
    try:
        return lmdb.open(str(path), map_size=FIRST_MAP_BYTES, subdir=True, lock=False)
    except lmdb.Error as error:
        raise _unwritten(str(path), error) from error


def stored(env: lmdb.Environment, key: str) -> bytes | None:
    """What is under a key of an LMDB that is written to."""
    with env.begin() as transaction:
        value = transaction.get(key.encode())
    return None if value is None else bytes(value)


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
