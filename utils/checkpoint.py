"""Checkpoints that are whole or absent: sharded save, published by rename, found again at start.

Layout: <folder>/step_000300/ holds torch's distributed checkpoint, config.yaml and manifest.json;
<folder>/latest names the newest for people and other tools; a start looks at the folders instead.
World size may change between save and load.
"""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from utils.distributed import Session
from utils.errors import UserError
from utils.files import write_text

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_NAME = re.compile(r"step_(\d{6,})$")

# What torch pickles into a checkpoint's .metadata, beside its dtypes.
_PATHS = {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"}
_PLAIN = {
    "collections": {"OrderedDict"},
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}


class _Unpickler(pickle.Unpickler):
    """Refuses a pickle that wants code."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and name not in _PLAIN.get(module, ()):
            raise pickle.UnpicklingError(
                f"it wants to run code ({module}.{name}), which is refused"
            )
        return super().find_class(module, name)


class Reader(dcp.FileSystemReader):
    """Reads a checkpoint's metadata once, and never runs code that it holds.

    For each of a checkpoint's tensors, reading them again would be quadratic work.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file = path / ".metadata"
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises ValueError that names the file if it is no metadata of a checkpoint."""
        if self._metadata is None:
            try:
                with self._file.open("rb") as file:
                    content = _Unpickler(file).load()
            except Exception as error:  # unpickling raises many types; all mean the same
                raise UserError(f"{self._file}: not readable as metadata: {error}") from error
            if not isinstance(content, Metadata):
                raise UserError(f"{self._file}: holds no metadata but a {type(content).__name__}")
            self._metadata = content
        return self._metadata


class _Planner(dcp.DefaultLoadPlanner):
    """Reads objects as torch reads weights: plain containers, no code."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


def save(
    folder: Path, step: int, state: dict[str, Any], texts: dict[str, str], session: Session
) -> Path:
    """Write `state` (and small text files) as the checkpoint of `step`. Collective.

    Until the very last rename nothing that a reader looks at exists.
    """
    target = folder / f"step_{step:06d}"
    part = folder / f"step_{step:06d}.tmp"
    if session.is_main:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    session.barrier()
    dcp.save(state, checkpoint_id=part)
    session.barrier()
    if session.is_main:
        for name, text in texts.items():
            write_text(part / name, text)
        sizes = {file.name: file.stat().st_size for file in sorted(part.iterdir())}
        write_text(part / MANIFEST, json.dumps({"step": step, "files": sizes}, indent=2))
        for file in part.iterdir():
            _sync(file)
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
        _sync(folder)
        write_text(folder / "latest", target.name + "\n")
    session.barrier()
    return target


def load(path: Path, state: dict[str, Any]) -> None:
    """Fill `state` in place from the checkpoint at `path`. Collective."""
    reader = Reader(path)
    reader.read_metadata()  # what is wrong here is told as it is; dcp.load wraps it
    dcp.load(state, storage_reader=reader, planner=_Planner())


def problem(path: Path) -> str | None:
    """Why the checkpoint at `path` is not whole, or None if it is."""
    try:
        sizes = dict(json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{path}: has no readable {MANIFEST}"
    for name, size in sizes.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            return f"{path}: {name} has {found} bytes, its manifest says {size}"
    return None


def complete(folder: Path) -> Iterator[Path]:
    """Whole checkpoints in `folder`, newest first; damaged ones are named in a warning."""
    for path in sorted(_all(folder), key=step_of, reverse=True):
        fault = problem(path)
        if fault is None:
            yield path
        else:
            log.warning("skipping a damaged checkpoint: %s", fault)


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    return next(complete(folder), None)


def any_saved(folder: Path) -> bool:
    """Whether `folder` holds checkpoints, whole or damaged."""
    return bool(_all(folder))


def step_of(path: Path) -> int:
    """The step that a checkpoint's name tells."""
    match = _NAME.search(path.name)
    assert match is not None, f"{path} is not named like a checkpoint"
    return int(match.group(1))


def prune(folder: Path, keep: int, session: Session) -> None:
    """Delete leftovers of torn saves and all but the `keep` newest whole checkpoints."""
    if session.is_main and folder.is_dir():
        for torn in folder.glob("step_*.tmp"):
            shutil.rmtree(torn, ignore_errors=True)
        for part in folder.glob(".*.part*"):  # of utils.files, killed before its rename
            part.unlink(missing_ok=True)
        for path in list(complete(folder))[keep:]:
            # Renamed first: killed between two files, it would look damaged and stay for ever.
            shutil.rmtree(path.rename(f"{path}.tmp"), ignore_errors=True)
    session.barrier()


def _all(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step_*") if _NAME.search(path.name) and path.is_dir()]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
