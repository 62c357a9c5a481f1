"""Whose a log directory is: what a run was begun with, and whether it may go on with this."""

from __future__ import annotations

import json
import logging
import socket
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from omegaconf import DictConfig, OmegaConf

from trainer.agreement import check_same_inputs, named_ranks
from trainer.config import CHANGEABLE, Config, read_run
from trainer.fingerprint import Fingerprint, fingerprint
from trainer.inputs import Inputs
from trainer.run import Run
from utils import checkpoint
from utils.config import ConfigError, differences, to_yaml
from utils.distributed import Session
from utils.errors import UserError
from utils.files import remove_leftovers, write_text
from utils.lock import FolderLock, State

log = logging.getLogger(__name__)

SHARED_S = 20.0  # what a shared file system may take to show a file to other hosts
CONFIG = "config.yaml"
FINGERPRINT = "fingerprint.json"  # of what a run reads, beside its config.yaml
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
SAVED = "last_save.json"


@dataclass(frozen=True)
class LogdirPolicy:
    """What the command line says about a log directory that is not empty."""

    allow_change: bool = False  # go on although settings, data or models have changed
    fresh: bool = False  # refuse one that holds a run
    saves: bool = True  # checkpoints will be written: all ranks must see it


@dataclass(frozen=True, eq=False)
class Claim:
    """A log directory that is this run's own, until it is released or the process ends."""

    logdir: Path
    texts: Mapping[str, str]  # the files that tell what the run was begun with, by name
    fingerprint: Fingerprint
    resume_from: Path | None  # the checkpoint that it goes on from; None = it begins
    locks: list[FolderLock] = field(default_factory=list)  # the main rank's; no other has one

    def confirm(self) -> None:
        """See that the directory is still this run's; on the main rank, before it is written to.

        One that was deleted is made again. Raises UserError if another run has taken it.
        """
        state = self.locks[-1].state()
        if state is State.FOREIGN:
            raise UserError(f"{self.logdir}: another run has taken it, so nothing is saved there")
        if state is State.GONE:
            self.logdir.mkdir(exist_ok=True)  # not its parents: a disk may have been unmounted
            self.locks.append(FolderLock.take(self.logdir))
            self.locks[-1].sign()
            self.write()
            log.warning(
                "%s: was deleted while the run was writing to it; it is made again, without what "
                "it held",
                self.logdir,
            )

    def write(self) -> None:
        """Write what the run was begun with."""
        for name, text in self.texts.items():
            write_text(self.logdir / name, text)

    def release(self) -> None:
        """Let others have it."""
        for lock in self.locks:
            lock.release()


def claim_logdir(
    run: Run, inputs: Inputs, session: Session, logdir: Path, policy: LogdirPolicy
) -> Claim:
    """Make the log directory this run's own, or find that it is. Collective.

    Nothing in it has changed where this raises: ConfigError, with all that differs, if it belongs
    to another run, if one is writing to it, or if its checkpoints are damaged or gone.
    """
    if logdir.exists() and not logdir.is_dir():
        raise ConfigError(f"--logdir {logdir}: is a file; give the name of a folder")
    here = _fingerprint(run, inputs, session)
    locks: list[FolderLock] = []
    session.on_main(lambda: locks.append(lock_logdir(logdir, fresh=policy.fresh)))
    try:
        if policy.saves:
            check_shared(session, logdir)
        found = find_checkpoint(logdir, session)
        if found is not None:
            _compare(run.config, here, logdir, allow_change=policy.allow_change)
        texts = {CONFIG: to_yaml(run.config), FINGERPRINT: here.to_json()}
        claim = Claim(logdir, texts, here, found, locks)
        session.barrier()
        session.on_main(claim.write)
    except BaseException:
        for lock in locks:
            lock.release()
        raise
    return claim


def lock_logdir(logdir: Path, *, fresh: bool = False) -> FolderLock:
    """Take the log directory, and first remove what a torn save has left: it may fill the disk."""
    if fresh and _holds_run(logdir):
        raise ConfigError(
            f"--fresh: {logdir} holds a run already, which would be overwritten; use a new "
            f"--logdir, or leave --fresh away to continue that run"
        )
    logdir.mkdir(parents=True, exist_ok=True)
    lock = FolderLock.take(logdir)
    try:
        if (logdir / CHECKPOINTS).is_dir():
            checkpoint.tidy(logdir / CHECKPOINTS)
        remove_leftovers(logdir)
        lock.sign()
    except BaseException:
        lock.release()
        raise
    return lock


def _holds_run(logdir: Path) -> bool:
    """Whether a run has left anything that another would replace."""
    names = (CONFIG, FINGERPRINT, METRICS, CHECKPOINTS, SAVED)
    return any((logdir / name).exists() for name in names)


def find_checkpoint(logdir: Path, session: Session) -> Path | None:
    """The checkpoint to go on from, every byte compared; None = the run has saved none. Collective.

    Raises ConfigError if it has saved some, and none is left or whole.
    """
    folder = logdir / CHECKPOINTS
    try:
        found = checkpoint.newest_good(folder, session)
    except UserError as error:
        raise ConfigError(str(error)) from error
    last = json.loads(session.from_main(json.dumps(_last_saved(logdir))))
    if found is None and last is not None:
        raise ConfigError(
            f"{folder}: holds no checkpoint, but the run had saved step {last}; restore the folder "
            f"or use a new --logdir; to begin it again from nothing, delete {logdir / SAVED}"
        )
    if found is not None and last is not None and checkpoint.step_of(found) < last:
        log.warning(
            "%s: the run had saved step %d, and goes on from step %d, the newest that is left",
            logdir,
            last,
            checkpoint.step_of(found),
        )
    return found


def note_saved(logdir: Path, step: int) -> None:
    """Remember, beside the checkpoints, that there is one: a folder that was emptied is no start.

    On the main rank, when the checkpoint is on the disk.
    """
    write_text(logdir / SAVED, json.dumps({"step": step}) + "\n")


def _last_saved(logdir: Path) -> int | None:
    try:
        return int(json.loads((logdir / SAVED).read_text(encoding="utf-8"))["step"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return 0  # something was saved, only which step cannot be read


def _compare(config: Config, here: Fingerprint, logdir: Path, *, allow_change: bool) -> None:
    """Refuse to go on with a run that is another, unless its user asks for it."""
    changed = [*_changed_settings(config, logdir), *_changed_inputs(here, logdir)]
    if changed and not allow_change:
        raise ConfigError(
            f"{logdir}: holds another run; use a new --logdir, restore what has changed, or "
            f"continue all the same with --allow_config_change: {'; '.join(changed)}"
        )
    for line in changed:
        log.warning("continuing although changed: %s", line)


def check_shared(session: Session, logdir: Path) -> None:
    """Raise ConfigError on all ranks unless each sees what the main one writes there. Collective.

    Otherwise a checkpoint would lack the shards of those that write elsewhere.
    """
    if session.world_size == 1:
        return
    mark = logdir / f".shared.{session.from_main(uuid.uuid4().hex)}"
    session.on_main(mark.touch)
    hosts = session.gather(socket.gethostname())
    blind = [rank for rank, seen in enumerate(session.gather(_appears(mark))) if not seen]
    session.on_main(mark.unlink)
    if blind:
        raise ConfigError(
            f"--logdir {logdir}: {named_ranks(blind, hosts)} cannot see what rank 0 "
            f"(host {hosts[0]}) writes there; checkpoints need a folder that all hosts share"
        )


def _appears(path: Path) -> bool:
    """Whether a file that another rank has made is there; file systems of networks may lag."""
    until = time.monotonic() + SHARED_S
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def _fingerprint(run: Run, inputs: Inputs, session: Session) -> Fingerprint:
    """That of all ranks, which must read the same; what one meets is raised on all. Collective."""
    found: list[Fingerprint] = []
    session.together(lambda: found.append(fingerprint(run, inputs)))
    check_same_inputs(found[0], session)
    return found[0]


def _changed_settings(config: Config, logdir: Path) -> list[str]:
    """Settings that are part of what a run is, and differ; others are told in the log."""
    path = logdir / CONFIG
    if not path.is_file():
        return []
    old, new = (cast(DictConfig, OmegaConf.structured(c)) for c in (read_run(path), config))
    changed = differences(old, new)
    foreign = []
    for key, (there, here) in changed.items():
        if any(key == free or key.startswith(f"{free}.") for free in CHANGEABLE):
            log.info("continuing with %s = %s (was %s)", key, here, there)
        else:
            foreign.append(f"{key}: is {there}, now {here}")
    return foreign


def _changed_inputs(here: Fingerprint, logdir: Path) -> list[str]:
    """How data and models differ from those that the run was begun with."""
    path = logdir / FINGERPRINT
    if not path.is_file():
        log.info("%s: not there (an older version's run); data and weights are not compared", path)
        return []
    try:
        there = Fingerprint.from_json(path.read_text(encoding="utf-8"))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: damaged: {error}; delete it to go on without") from error
    return list(here.differences(there))
