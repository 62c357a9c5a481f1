"""Checkpoints that are whole or absent: sharded save, published by rename, found again at start.

Layout: <folder>/step_000300/ holds torch's distributed checkpoint, config.yaml and manifest.json;
<folder>/latest names the newest for people and other tools; a start looks at the folders instead.
World size may change between save and load. docs/checkpoints.md says what is promised.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from utils.checkpoint_manifest import (
    MANIFEST,
    Manifest,
    Written,
    is_step_name,
    problem,
    step_name,
    step_of,
)
from utils.checkpoint_reader import LoadPlanner, Reader
from utils.checkpoint_writer import CopyPlanner, Writer, hash_on_disk
from utils.distributed import Session
from utils.errors import UserError, words
from utils.files import disk_refusal, remove_leftovers, write_text

__all__ = ["MANIFEST", "Reader", "problem", "step_of"]

log = logging.getLogger(__name__)

LATEST = "latest"
_TORN = ".tmp"  # what the name of a checkpoint ends with that is being written, or deleted
_ASIDE = ".old"  # and of one whose place another is about to take


class SaveError(UserError):
    """A checkpoint could not be written; those that are there are as they were."""


def save(
    folder: Path,
    step: int,
    state: dict[str, Any],
    texts: Mapping[str, str],
    session: Session,
    *,
    copies: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write `state` (and small text files) as the checkpoint of `step`. Collective.

    Until the very last rename nothing that a reader looks at exists; before it all files are read
    back from the disk. copies: what to write in place of the state's values, which may move on
    meanwhile. facts: more that the manifest tells. Raises SaveError on every rank if a disk or a
    file system refuses.
    """
    target = folder / step_name(step)
    part = folder / f"{target.name}{_TORN}"

    def begin() -> None:
        _remove(part)
        part.mkdir(parents=True)

    def publish() -> None:
        if target.is_dir():
            _set_aside(target)
        elif target.exists():  # somebody's own file
            log.warning("%s: is a file; it is now called %s.moved", target, target.name)
            target.replace(target.with_name(f"{target.name}.moved"))
        part.rename(target)
        _sync(folder)
        _remove(_aside(target))
        with suppress(OSError):  # the checkpoint is there; this is for people
            write_text(folder / LATEST, target.name + "\n")

    writer = Writer(part, name=target.name)
    planner = None if copies is None else CopyPlanner(copies)
    try:
        refused_together(lambda: session.on_main(begin))
        try:
            dcp.save(
                state,
                storage_writer=writer,
                planner=planner,
                process_group=session.channel,
                no_dist=not dist.is_initialized(),
            )
        except CheckpointException as error:  # on every rank, whichever failed
            _tell_refusals(error, part, session)
            raise
        refused_together(lambda: _seal(part, step, writer.written, texts, facts or {}, session))
        refused_together(lambda: session.on_main(publish))
    except Exception:
        if session.is_main:
            _remove(part)  # what is torn must not fill the disk
        raise
    return target


def _seal(
    part: Path,
    step: int,
    written: Mapping[str, Written],
    texts: Mapping[str, str],
    facts: Mapping[str, Any],
    session: Session,
) -> None:
    """Compare what lies on the disk with what was written, and write the manifest. Collective."""
    session.together(lambda: _compare(part, written))
    gathered = session.gather(dict(written))

    def finish() -> None:
        files = {name: value for own in gathered for name, value in own.items()}
        for name, text in texts.items():
            write_text(part / name, text)
            files[name] = hash_on_disk(part / name)
        write_text(part / MANIFEST, Manifest(step, files, facts).to_json())
        _sync(part)

    session.on_main(finish)


def _compare(part: Path, written: Mapping[str, Written]) -> None:
    for name, expected in written.items():
        if hash_on_disk(part / name) != expected:
            raise SaveError(f"{part / name}: the disk gives back other bytes than were written")


def refused_together(task: Callable[[], None]) -> None:
    """Do a task that fails on all ranks alike; what a file system says becomes SaveError."""
    try:
        task()
    except SaveError:
        raise
    except (OSError, UserError) as error:
        raise SaveError(words(error) or str(error)) from error


def _tell_refusals(error: CheckpointException, part: Path, session: Session) -> None:
    """Raise SaveError, on every rank, if a disk refused a rank's file."""
    own = error.failures.get(session.rank)
    refusal: BaseException | None = None
    if own is not None and isinstance(own[0], Exception):
        files = sorted(part.glob(f"__{session.rank}_*")) or [part / f"__{session.rank}_0.distcp"]
        refusal = disk_refusal(files[-1], own[0])
        if refusal is None and isinstance(own[0], OSError):
            refusal = own[0]
    told = session.gather(None if refusal is None else words(refusal) or str(refusal))
    lines = [
        f"rank {rank}: {text}" if session.world_size > 1 else text
        for rank, text in enumerate(told)
        if text is not None
    ]
    if lines:
        raise SaveError("\n".join(lines)) from error


def load(path: Path, state: dict[str, Any]) -> None:
    """Fill `state` in place from the checkpoint at `path`. Collective."""
    reader = Reader(path)
    reader.read_metadata()  # what is wrong here is told as it is; dcp.load wraps it
    dcp.load(state, storage_reader=reader, planner=LoadPlanner())


def complete(folder: Path) -> Iterator[Path]:
    """Whole checkpoints in `folder`, newest first; damaged ones are named in a warning.

    Sizes are compared, and the hashes of small files.
    """
    for path in newest_first(folder):
        fault = problem(path)
        if fault is None:
            yield path
        else:
            _tell_damaged(fault)


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    return next(complete(folder), None)


def newest_good(folder: Path, session: Session, until: int | None = None) -> Path | None:
    """The newest checkpoint of which every byte is as it was written, or None. Collective.

    until: the last step that it may be of; None = any. Ranks share the reading, each mostly of what
    it will load, and all get the same answer. Damaged ones are named in a warning. Raises UserError
    if there are checkpoints, and all are damaged.
    """
    found = [path for path in newest_first(folder) if until is None or step_of(path) <= until]
    names = json.loads(session.from_main(json.dumps([path.name for path in found])))
    for name in names:
        with session.uneven_work():
            fault = problem(folder / name, rank=session.rank, world_size=session.world_size)
        faults = [text for text in session.gather(fault) if text is not None]
        if not faults:
            return folder / name
        if session.is_main:
            _tell_damaged(faults[0])
    if names:
        raise UserError(
            f"{folder}: all its checkpoints are damaged; restore one, or use a new --logdir"
        )
    return None


def _tell_damaged(fault: str) -> None:
    log.warning("skipping a damaged checkpoint: %s", fault)


def newest_first(folder: Path) -> list[Path]:
    """All checkpoints in `folder`, whole or damaged."""
    found = [path for path in folder.glob("step_*") if is_step_name(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def any_saved(folder: Path) -> bool:
    """Whether `folder` holds checkpoints, whole or damaged, or has held some."""
    return bool(newest_first(folder)) or (folder / LATEST).exists()


def tidy(folder: Path) -> None:
    """Remove what killed saves have left, and bring back what they were about to replace."""
    for aside in folder.glob(f"step_*{_ASIDE}"):
        target = aside.with_name(aside.name.removesuffix(_ASIDE))
        if is_step_name(target.name) and not target.exists():
            aside.rename(target)
        else:
            _remove(aside)
    for torn in folder.glob(f"step_*{_TORN}"):
        _remove(torn)
    remove_leftovers(folder)


def prune(
    folder: Path,
    keep: int,
    session: Session,
    stays: Callable[[Sequence[int]], Collection[int]] = lambda steps: (),
) -> None:
    """Delete leftovers of torn saves and all but the `keep` newest whole checkpoints. Collective.

    stays: of the steps that are saved, those that are not deleted.
    """

    def delete() -> None:
        tidy(folder)
        whole = list(complete(folder))
        staying = stays([step_of(path) for path in whole])
        for path in whole[keep:]:
            if step_of(path) not in staying:
                # Renamed first: killed between two files, it would look damaged and stay for ever.
                _remove(path.rename(f"{path}{_TORN}"))

    session.on_main(delete)


def drop_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of later steps. On the main rank, when none is being written."""
    for path in newest_first(folder):
        if step_of(path) > step:
            _remove(path.rename(f"{path}{_TORN}"))
        else:
            write_text(folder / LATEST, path.name + "\n")
            return


def stay(steps: Sequence[int], scores: Mapping[int, float], *, every: int, best: int) -> set[int]:
    """Steps whose checkpoints stay for ever: each `every`-th, and the `best` by score.

    every, best: 0 = none. scores: by step of a probe, more is better; a checkpoint has that of the
    newest probe until then.
    """
    kept = {step for step in steps if every and step % every == 0}
    found = {}
    for step in steps:
        before = [probe for probe in scores if probe <= step]
        if before:
            found[step] = scores[max(before)]
    ranked = sorted(found, key=lambda step: (found[step], step), reverse=True)
    return kept | set(ranked[:best])


def _aside(target: Path) -> Path:
    return target.with_name(f"{target.name}{_ASIDE}")


def _set_aside(target: Path) -> None:
    """Free a place: a kill before it is taken again loses nothing (see `tidy`)."""
    _remove(_aside(target))
    target.rename(_aside(target))


def _remove(path: Path) -> None:
    """Delete a folder or a file, if it is there and may be."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
