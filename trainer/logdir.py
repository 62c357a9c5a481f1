"""Whose a log directory is: what a run was begun with, and whether it may go on with this."""

from __future__ import annotations

import json
import logging
import socket
import time
import uuid
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
from utils.files import write_text

log = logging.getLogger(__name__)

SHARED_S = 20.0  # what a shared file system may take to show a file to other hosts
FINGERPRINT = "fingerprint.json"  # of what a run reads, beside its config.yaml


def claim_logdir(
    run: Run, inputs: Inputs, session: Session, logdir: Path, *, allow_change: bool = False
) -> None:
    """Make the log directory this run's own, or find that it is. Collective.

    allow_change: continue a run although its settings, its data or its models have changed.
    Raises ConfigError, with all that differs, if it belongs to another run.
    """
    if logdir.exists() and not logdir.is_dir():
        raise ConfigError(f"--logdir {logdir}: is a file; give the name of a folder")
    whole = checkpoint.latest(logdir / "checkpoints")
    if whole is None and checkpoint.any_saved(logdir / "checkpoints"):
        raise ConfigError(
            f"{logdir}: all its checkpoints are damaged; restore one, or use a new --logdir"
        )
    here = _fingerprint(run, inputs, session)
    if whole is not None:
        changed = [*_changed_settings(run.config, logdir), *_changed_inputs(here, logdir)]
        if changed and not allow_change:
            raise ConfigError(
                f"{logdir}: holds another run; use a new --logdir, restore what has changed, or "
                f"continue all the same with --allow_config_change: {'; '.join(changed)}"
            )
        for line in changed:
            log.warning("continuing although changed: %s", line)

    def begin() -> None:
        write_text(logdir / "config.yaml", to_yaml(run.config))
        write_text(logdir / FINGERPRINT, here.to_json())

    session.barrier()
    session.on_main(begin)


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
    path = logdir / "config.yaml"
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
