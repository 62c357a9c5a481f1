"""Checkpoints that are whole or absent: sharded save, published by rename, found again at start.

Layout: <folder>/step_000300/ holds torch's distributed checkpoint, config.yaml and manifest.json;
<folder>/latest names the newest for people and other tools; a start looks at the folders instead.
World size may change between save and load.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp

from utils.distributed import Session
from utils.files import write_text

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_NAME = re.compile(r"step_(\d{6,})$")


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
    dcp.load(state, checkpoint_id=path)


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
