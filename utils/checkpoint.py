"""Checkpoints that are whole or absent: sharded save, published by rename, found again at start.

Layout: <folder>/step_000300/ holds torch's distributed checkpoint, config.yaml and manifest.json;
<folder>/latest names the newest for people and other tools; a start looks at the folders instead.
World size may change between save and load.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from utils.distributed import Session
from utils.errors import UserError, words
from utils.files import disk_refusal, write_text

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

    def read_rows(self, name: str, rows: slice) -> Tensor:
        """Rows of a stored tensor along its first dimension; the bytes of others are not read.

        rows: in steps of 1. A tensor without dimensions is read whole.
        """
        stored = self.read_metadata().state_dict_metadata[name]
        assert isinstance(stored, TensorStorageMetadata), name
        size = list(stored.size)
        first, end, _ = rows.indices(size[0]) if size else (0, 1, 1)
        result = torch.empty(
            [max(0, end - first), *size[1:]] if size else [1], dtype=stored.properties.dtype
        )
        for chunk in stored.chunks:
            offsets, sizes = (list(chunk.offsets), list(chunk.sizes)) if size else ([0], [1])
            begin, stop = max(first, offsets[0]), min(end, offsets[0] + sizes[0])
            if begin >= stop or not math.prod(sizes):
                continue
            place = [slice(begin - first, stop - first)]
            place += [slice(o, o + s) for o, s in zip(offsets[1:], sizes[1:], strict=True)]
            index = MetadataIndex(name, chunk.offsets)
            result[tuple(place)] = self._chunk_rows(index, begin - offsets[0], stop - offsets[0])
        return result if size else result[0]

    def _chunk_rows(self, index: MetadataIndex, begin: int, stop: int) -> Tensor:
        """Rows `begin` to `stop` of one chunk, which `torch.save` wrote somewhere in a file."""
        info = self.read_metadata().storage_data[index]
        with (self._file.parent / info.relative_path).open("rb") as file:
            view = self._slice_file(file, info)
            layout = torch.load(view, map_location="meta", weights_only=True)
            at = layout.untyped_storage()._checkpoint_offset
            if not layout.is_contiguous() or at is None:  # as other systems may write
                view.seek(0)
                whole = torch.load(view, map_location="cpu", weights_only=True)
                return whole[begin:stop] if whole.ndim else whole
            row = layout.nbytes // len(layout) if layout.ndim else layout.nbytes
            part = torch.empty([stop - begin, *layout.shape[1:]], dtype=layout.dtype)
            skipped = layout.storage_offset() * layout.element_size() + begin * row
            file.seek(info.offset + at + skipped)
            raw = part.view(-1).view(torch.uint8).numpy()
            count = file.readinto(raw)
            assert count == raw.nbytes, f"{file.name}: {count} of {raw.nbytes} bytes"
            return part


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

    def begin() -> None:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)

    def publish() -> None:
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

    session.on_main(begin)
    try:
        dcp.save(state, checkpoint_id=part)
    except CheckpointException as error:  # on every rank, whichever failed
        _tell_refusals(error, part, session)
        raise
    session.barrier()
    session.on_main(publish)
    return target


def _tell_refusals(error: CheckpointException, part: Path, session: Session) -> None:
    """Raise UserError, on every rank, if a disk refused a rank's file; the torn save is removed."""
    own = error.failures.get(session.rank)
    refusal = None
    if own is not None and isinstance(own[0], Exception):
        files = sorted(part.glob(f"__{session.rank}_*")) or [part / f"__{session.rank}_0.distcp"]
        refusal = disk_refusal(files[-1], own[0])
    told = session.gather(None if refusal is None else words(refusal))
    session.on_main(lambda: shutil.rmtree(part, ignore_errors=True))
    lines = [
        f"rank {rank}: {text}" if session.world_size > 1 else text
        for rank, text in enumerate(told)
        if text is not None
    ]
    if lines:
        raise UserError("\n".join(lines)) from error


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

    def tidy() -> None:
        for torn in folder.glob("step_*.tmp"):
            shutil.rmtree(torn, ignore_errors=True)
        for part in folder.glob(".*.part*"):  # of utils.files, killed before its rename
            part.unlink(missing_ok=True)
        for path in list(complete(folder))[keep:]:
            # Renamed first: killed between two files, it would look damaged and stay for ever.
            shutil.rmtree(path.rename(f"{path}.tmp"), ignore_errors=True)

    session.on_main(tidy)


def _all(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step_*") if _NAME.search(path.name) and path.is_dir()]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
