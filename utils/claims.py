"""Folders that several calls fill: what they were begun with, and what was not taken and why.

A folder's claim is its settings file: written when the folder is begun, compared when a later call
goes on. It is settings.json, or where the folder is read as data, a manifest (utils/records.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from utils.config import ConfigError
from utils.distributed import Session
from utils.files import remove_leftovers, write_text
from utils.records import read_mapping, read_records

SETTINGS = "settings.json"
REPORT = "report.json"  # written when LMDB shards are complete
ABSENT = "absent"  # how messages call the value of a key that is not there


@dataclass(frozen=True)
class Claim:
    """What makes an output folder one call's own, and later calls' that have the same settings."""

    folder: Path
    settings: Mapping[str, object]  # all that the results depend on, fit for JSON
    holds: str  # what lies in the folder, for messages
    flag: str = "--output_folder"  # what gave the folder, for messages
    file: str = SETTINGS
    results: str | None = None  # a glob of what calls make; there without `file`, it is foreign
    older: Mapping[str, object] = field(default_factory=dict)  # settings that older folders lack

    def take(self, session: Session) -> None:
        """Begin the folder, or see that a call of these settings began it. Collective.

        No rank returns before the settings are on the disk. Raises ConfigError on every rank alike.
        """
        session.on_main(self.check_and_begin)

    def check_and_begin(self) -> None:
        """What `take` does, on the main rank alone."""
        self.check()
        self.begin()

    def check(self) -> None:
        """Raise ConfigError if the folder was begun with other settings, or is someone else's."""
        path = self.folder / self.file
        if path.is_file():
            try:
                there = read_mapping(path, f"the settings of {self.holds}")
            except ConfigError as error:
                raise ConfigError(f"{error}; use another folder") from error
            self.compare(there)
        elif self.results is not None and any(self.folder.glob(self.results)):
            raise ConfigError(
                f"{self.flag} {self.folder}: holds {self.holds} of unknown origin (it has no "
                f"{self.file}); use another folder"
            )

    def compare(self, there: Mapping[str, object]) -> None:
        """Raise ConfigError, with what differs, unless `there` are these settings."""
        here = json.loads(json.dumps(self.settings))
        there = {**self.older, **there}
        changed = [
            f"{key} was {there.get(key, ABSENT)}, is {here.get(key, ABSENT)}"
            for key in {**here, **there}
            if there.get(key) != here.get(key)
        ]
        if changed:
            raise ConfigError(
                f"{self.flag} {self.folder}: holds {self.holds} of other settings "
                f"({'; '.join(changed)}); use another folder"
            )

    def begin(self) -> None:
        """Write the settings if there are none; remove what killed calls left half written."""
        remove_leftovers(self.folder)
        if not (self.folder / self.file).is_file():
            write_text(self.folder / self.file, json.dumps(self.settings, indent=1))


@dataclass(frozen=True, order=True)
class Rejected:
    """One input that was not taken."""

    file: str  # from the folder that the inputs lie in
    reason: str


def rejection(file: str, path: Path, error: Exception) -> Rejected:
    """What an error about the file at `path` says, without naming it twice."""
    return Rejected(file, str(error).partition("\n")[0].removeprefix(f"{path}: "))


def read_rejected(path: Path) -> list[Rejected]:
    """What `write_rejected` wrote, or nothing. Raises ConfigError if it is damaged."""
    return read_records(path, Rejected, "a list of rejected files")


def write_rejected(path: Path, rejected: Sequence[Rejected]) -> None:
    """Replace a list of rejected inputs, in one step."""
    lines = [asdict(entry) for entry in rejected]
    write_text(path, json.dumps(lines, indent=1, ensure_ascii=False) + "\n")
