"""Clips on disk: their hashes, noted as they are written, and whether they still are what was."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from utils.errors import UserError
from utils.hashes import sha256_of
from utils.media.video import Extent, check_clip, written_extent

log = logging.getLogger(__name__)

NOTES = "written.{rank}.jsonl"  # what a call has written, until the manifest tells it
SHOWN = 12  # digits of a hash


class ClipNotes:
    """What this rank has written, by name with SHA-256; kept in a file, so no kill loses it."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self._path = folder / NOTES.format(rank=rank)
        self.digests: dict[str, str] = {}

    def add(self, file: Path, sha256: str) -> None:
        """Note a clip that is in its place; durable."""
        name = file.relative_to(self.folder).as_posix()
        self.digests[name] = sha256
        with self._path.open("a", encoding="utf-8") as notes:
            notes.write(json.dumps({"file": name, "sha256": sha256}) + "\n")
            notes.flush()
            os.fsync(notes.fileno())


def noted(folder: Path) -> dict[str, str]:
    """What stopped calls noted; a line that a kill or a full disk tore is left out."""
    found = {}
    for path in sorted(folder.glob(NOTES.format(rank="*"))):
        for line in path.read_bytes().splitlines():
            try:
                note = json.loads(line)
                found[str(note["file"])] = str(note["sha256"])
            except (ValueError, TypeError, KeyError):
                continue  # its clip is read instead
    return found


def forget_notes(folder: Path) -> None:
    """Remove notes that are in the manifest."""
    for path in folder.glob(NOTES.format(rank="*")):
        path.unlink()


def whole_clips(
    folder: Path, clips: Mapping[str, Extent], known: Mapping[str, str]
) -> dict[str, str]:
    """The clips that are there and as they were written, with their SHA-256; others are told.

    clips: the frames and the size of each, before it is enlarged for its file. known: the hashes
    that were noted; a clip without one (an older version's, or the last before a kill) is read to
    its end instead.
    """
    there = {file: folder / file for file in clips if (folder / file).is_file()}
    digests = sha256_of(there, "clips")
    for file in list(digests):
        fault = _fault(there[file], clips[file], digests[file], known.get(file))
        if fault is not None:
            log.warning("%s; it is made again", fault)
            del digests[file]
    return digests


def _fault(path: Path, extent: Extent, digest: str, known: str | None) -> str | None:
    """Why a clip is not what was written, in words."""
    if known is not None:
        if digest == known:
            return None
        return (
            f"{path}: has changed since it was written (its SHA-256 was {known[:SHOWN]}..., is "
            f"{digest[:SHOWN]}...)"
        )
    try:
        check_clip(path, written_extent(extent.frames, extent.height, extent.width))
    except UserError as error:
        return str(error)
    return None


def absent(folder: Path, files: Iterable[str]) -> list[str]:
    """Those of `files` that are not in a folder."""
    return [file for file in files if not (folder / file).is_file()]
