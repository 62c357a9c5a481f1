"""Whose a log directory is: what a run was begun with, and whether it may go on with this."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import cast

from omegaconf import DictConfig, OmegaConf

from trainer.config import CHANGEABLE, Config, read_run
from trainer.fingerprint import Fingerprint, fingerprint
from trainer.inputs import Inputs
from trainer.run import Run
from utils import checkpoint
from utils.config import ConfigError, differences, to_yaml
from utils.distributed import Session
from utils.files import write_text

log = logging.getLogger(__name__)

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


def _fingerprint(run: Run, inputs: Inputs, session: Session) -> Fingerprint:
    """The main rank's, on every rank; what it meets while reading is raised on all. Collective."""
    found: list[str] = []
    session.on_main(lambda: found.append(fingerprint(run, inputs).to_json()))
    return Fingerprint.from_json(session.from_main("".join(found)))


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
