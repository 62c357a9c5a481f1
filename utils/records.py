"""JSON files that this project wrote, read back; one that is damaged is named."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import (
    Any,
    ClassVar,
    Literal,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from utils.config import ConfigError
from utils.errors import UserError

MANIFEST = "manifest.json"


class DamagedError(UserError):
    """A record whose fields cannot be what was written; the message does not name the file."""


class Manifest(Protocol):
    """A dataclass that a folder's manifest.json holds."""

    DESCRIBES: ClassVar[str]  # what lies in the folder, for messages
    __dataclass_fields__: ClassVar[dict[str, Any]]


M = TypeVar("M", bound=Manifest)
R = TypeVar("R")


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """The mapping in a JSON file. Raises ConfigError, that it is not `what`, if it is damaged."""
    return _read(path, dict, what)


def read_rows(path: Path, what: str) -> list[dict[str, Any]]:
    """The mappings that a JSON file lists, or none without one. Raises as `read_mapping` does."""
    rows = _read(path, list, what) if path.is_file() else []
    for row in rows:
        if not isinstance(row, dict):
            raise ConfigError(f"{path}: not {what}: lists {row!r:.60}")
    return rows


def read_json_lines(path: Path, what: str) -> list[dict[str, Any]]:
    """The mapping on each line of a file, or none without it. Raises as `read_mapping` does."""
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path}: not {what}: line {number}: {error}") from error
    return rows


def read_records(path: Path, kind: type[R], what: str) -> list[R]:
    """The dataclasses that a JSON file lists, or none without one. Raises as `read_rows` does."""
    try:
        return [from_json(row, kind) for row in read_rows(path, what)]
    except DamagedError as error:
        raise ConfigError(f"{path}: not {what}: {error}") from error


def read_manifest(folder: Path, kind: type[M]) -> M | None:
    """A folder's manifest, or None without one. Raises ConfigError if it is damaged."""
    path, what = folder / MANIFEST, f"a manifest of {kind.DESCRIBES}"
    if not path.is_file():
        return None
    try:
        return from_json(read_mapping(path, what), kind)
    except DamagedError as error:
        raise ConfigError(f"{path}: not {what}: {error}") from error


def _read(path: Path, kind: type[R], what: str) -> R:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not {what}: {error}") from error
    if not isinstance(content, kind):
        raise ConfigError(
            f"{path}: not {what}: holds a {type(content).__name__}, not a {kind.__name__}"
        )
    return content


def from_json(content: dict[str, Any], kind: type[R]) -> R:
    """A dataclass from what JSON made of it. Raises DamagedError if a field is not what it was."""
    assert is_dataclass(kind), "only dataclasses know their fields"
    hints = get_type_hints(kind)
    wrong = [
        f"'{name}' is {content[name]!r:.60}"
        for name in (field.name for field in fields(kind))
        if name in content and not _fits(content[name], hints[name])
    ]
    if wrong:
        raise DamagedError("; ".join(wrong))
    try:
        return kind(**content)
    except TypeError as error:  # a field is missing, or unknown
        raise DamagedError(str(error).removeprefix(f"{kind.__name__}.__init__() ")) from error


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is of a plain type; a whole number is a float as well."""
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(item, get_args(hint)[0]) for item in value)
    return isinstance(value, int | float if hint is float else get_origin(hint) or hint)
