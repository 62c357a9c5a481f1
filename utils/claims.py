"""Folders that several calls of a script fill: their settings, and what was not taken and why."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from utils.config import ConfigError
from utils.distributed import Session
from utils.errors import UserError
from utils.files import write_text

SETTINGS = "settings.json"  # written when a folder is begun
REPORT = "report.json"  # written when LMDB shards are complete


@dataclass(frozen=True, order=True)
class Rejected:
    """One input that was not taken."""

    file: str  # from the folder that the inputs lie in
    reason: str


def rejection(file: str, path: Path, error: Exception) -> Rejected:
    """What an error about the file at `path` says, without naming it twice."""
    return Rejected(file, str(error).partition("\n")[0].removeprefix(f"{path}: "))


def claim_folder(
    folder: Path, settings: Mapping[str, object], session: Session, *, holds: str, flag: str
) -> None:
    """Write the settings of an output folder; a no-op if it was begun with them. Collective.

    What a killed call left half written is removed. Raises ConfigError, on every rank, if the
    folder was begun with other settings. holds, flag: for that message.
    """
    check_settings(folder, settings, holds=holds, flag=flag)
    session.barrier()
    if session.is_main:
        for part in folder.rglob(".*.part*"):
            part.unlink()
        write_settings(folder, settings)
    session.barrier()


def check_settings(
    folder: Path, settings: Mapping[str, object], *, holds: str, flag: str = "--output_folder"
) -> None:
    """Refuse other settings than those that an output folder was begun with, if it was.

    Raises ConfigError: `refuse_other_settings`, and ValueError if settings.json is damaged.
    """
    path = folder / SETTINGS
    if not path.is_file():
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged: {error}; use another folder") from error
    refuse_other_settings(folder, there, settings, holds=holds, flag=flag)


def write_settings(folder: Path, settings: Mapping[str, object]) -> None:
    """Begin an output folder."""
    write_text(folder / SETTINGS, json.dumps(settings, indent=1))


def refuse_other_settings(
    folder: Path,
    there: Mapping[str, object],
    here: Mapping[str, object],
    *,
    holds: str,
    flag: str = "--output_folder",
) -> None:
    """Raise ConfigError, with what differs, unless an output folder was begun with these settings.

    holds: what lies in the folder, flag: what gave it; both for the message.
    """
    changed = [f"{k} was {there.get(k)}, is {here[k]}" for k in here if there.get(k) != here[k]]
    if changed:
        raise ConfigError(
            f"{flag} {folder}: holds {holds} of other settings ({'; '.join(changed)}); "
            f"use another folder"
        )


def read_rejected(path: Path) -> list[Rejected]:
    """What `write_rejected` wrote, or nothing. Raises ValueError if it is damaged."""
    if not path.is_file():
        return []
    try:
        return [Rejected(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: not a list of rejected files: {error}") from error


def write_rejected(path: Path, rejected: Sequence[Rejected]) -> None:
    """Replace a list of rejected inputs, in one step."""
    lines = [asdict(entry) for entry in rejected]
    write_text(path, json.dumps(lines, indent=1, ensure_ascii=False) + "\n")
