"""Files that appear whole or not at all, and what a disk says that takes no more."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

_PROBE_BYTES = 2**20
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # as Rust writes it, in the messages of safetensors
_PART = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)\.part(\.[^.]*)?")  # what is half written


@contextlib.contextmanager
def replaced_atomically(path: Path, parts: Path | None = None) -> Iterator[Path]:
    """Give a temporary path to write; on success it takes the place of `path`, durably.

    What a killed process left half written of the same file is removed. parts: a folder for the
    temporary path, if it is on the same file system; None = beside `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.parent
    if parts is not None and parts.stat().st_dev == folder.stat().st_dev:
        folder = parts
    for old, name in _abandoned(folder).items():
        if name == path.name:
            old.unlink(missing_ok=True)
    part = folder / f".{path.name}.{os.getpid()}.part{path.suffix}"
    try:
        with writing(part, told_as=path):
            yield part
            with part.open("rb") as file:
                os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half written in a folder and its sub-folders."""
    for inner in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        for part in _abandoned(inner):
            part.unlink(missing_ok=True)


def _abandoned(folder: Path) -> dict[Path, str]:
    """Half written files of a folder whose writers are gone, and what each was to be called."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        found = [(Path(entry.path), _PART.fullmatch(entry.name)) for entry in entries]
    return {
        path: match["name"]
        for path, match in found
        if match and path.is_file() and not _writes(int(match["process"]))
    }


def _writes(process: int) -> bool:
    """Whether another process of this machine has that number, which may still be writing."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        return True
    return True


def write_text(path: Path, text: str) -> None:
    """Replace a text file, UTF-8, in one step."""
    with replaced_atomically(path) as part:
        part.write_text(text, encoding="utf-8")


def append_text(path: Path, text: str) -> None:
    """Add to a text file, UTF-8, all of it or nothing. Raises OSError that names the file."""
    data = text.encode("utf-8")
    with writing(path), path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            written = file.write(data)
            if written < len(data):
                written += file.write(data[written:])  # says why it took no more
            if written < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise


@contextlib.contextmanager
def writing(path: Path, *, told_as: Path | None = None) -> Iterator[None]:
    """Let the disk speak if the body fails to write `path`: raises OSError that names the file.

    Libraries make errors of their own out of a full disk, which do not say so. told_as: another
    name for the file in that error.
    """
    told = path if told_as is None else told_as
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(path), path):
            raise
        raise OSError(error.errno, error.strerror, str(told)) from error
    except Exception as error:
        refusal = disk_refusal(path, error)
        if refusal is None:
            raise
        raise OSError(refusal.errno, refusal.strerror, str(told)) from error


def disk_refusal(path: Path, error: Exception) -> OSError | None:
    """What the disk says of writing more to `path`, where a library failed with `error`; or None.

    Adds to the file: it is broken already.
    """
    told = _OS_ERROR.search(str(error))
    if told is not None:
        number = int(told.group(1))
        return OSError(number, os.strerror(number), str(path))
    try:
        with path.open("ab") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as refusal:
        return OSError(refusal.errno, refusal.strerror, str(path))
    return None
