"""The manifest of a checkpoint: what its files were when they were written, and are they still.

It has a size and a SHA-256 of each file, and one of itself. Those of version 0.1 had sizes alone.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from utils.checkpoint_reader import Reader
from utils.errors import UserError
from utils.hashes import content_hash
from utils.version import VERSION

MANIFEST = "manifest.json"
DATA = ".distcp"  # what the names of files end with that hold tensors: nearly all bytes
_NAME = re.compile(r"step_(\d{6,})")
_OF_RANK = re.compile(rf"__(\d+)_\d+\{DATA}")


@dataclass(frozen=True)
class Written:
    """What went into a file, as counted and hashed on its way to the disk."""

    bytes: int
    sha256: str | None  # None = of version 0.1, which did not hash


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is."""

    step: int
    files: Mapping[str, Written]
    facts: Mapping[str, Any] = field(default_factory=dict)  # of the run: hashes, versions

    def to_json(self) -> str:
        """The file's text; its last entry is the SHA-256 of all others."""
        content = {
            "step": self.step,
            "files": {name: asdict(written) for name, written in sorted(self.files.items())},
            "facts": dict(self.facts),
        }
        return json.dumps({**content, "sha256": _seal(content)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """What `to_json` gave, or version 0.1 wrote. Raises UserError for any other text."""
        try:
            read = json.loads(text)
            if read.keys() == {"step", "files"}:
                sizes = {name: Written(int(size), None) for name, size in read["files"].items()}
                result = cls(int(read["step"]), sizes)
            else:
                files = {name: Written(**written) for name, written in read["files"].items()}
                result = cls(int(read["step"]), files, read["facts"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError("no manifest") from error
        # Written anew it must be the same text: so no byte of it can have changed.
        if read.keys() != {"step", "files"} and result.to_json() != text:
            raise UserError("not the text that was written")
        return result


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def versions() -> dict[str, str]:
    """What wrote a checkpoint, for its manifest."""
    return {"fewstep": VERSION, "torch": torch.__version__, "python": platform.python_version()}


def step_name(step: int) -> str:
    """How a checkpoint's folder is called."""
    return f"step_{step:06d}"


def is_step_name(name: str) -> bool:
    """Whether a checkpoint's folder may be called so."""
    return _NAME.fullmatch(name) is not None


def step_of(path: Path) -> int:
    """The step that a checkpoint's name tells."""
    match = _NAME.fullmatch(path.name)
    assert match is not None, f"{path} is not named like a checkpoint"
    return int(match.group(1))


def problem(path: Path, *, rank: int | None = None, world_size: int = 1) -> str | None:
    """Why the checkpoint at `path` is not what was saved, or None if it is.

    All sizes are compared, and the hashes of all files but those of tensors. rank: compare the
    hashes of its share of these too; that of `world_size` ranks together is the whole.
    """
    try:
        manifest = Manifest.from_json((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{path}: has no readable {MANIFEST}"
    if is_step_name(path.name) and manifest.step != step_of(path):
        return f"{path}: its {MANIFEST} is of step {manifest.step}"
    try:
        return next(_faults(path, manifest, rank, world_size), None)
    except OSError as error:
        return f"{error.filename or path}: cannot be read: {error.strerror}"


def _faults(path: Path, manifest: Manifest, rank: int | None, world_size: int) -> Iterator[str]:
    for name, written in manifest.files.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != written.bytes:
            yield f"{path}: {name} has {found} bytes, its manifest says {written.bytes}"
    hashed = [name for name in manifest.files if not name.endswith(DATA)]
    if rank is not None:
        hashed += [n for n in manifest.files if n.endswith(DATA) and _reader(n, world_size) == rank]
    for name in hashed:
        expected = manifest.files[name].sha256
        if expected is not None and content_hash(path / name) != expected:
            yield f"{path}: the content of {name} is not what was saved (its SHA-256 differs)"
    if all(written.sha256 is None for written in manifest.files.values()):
        try:
            Reader(path).read_metadata()
        except UserError as error:
            yield str(error)


def _reader(name: str, world_size: int) -> int:
    """The rank that compares a file of tensors: the one that reads most of it, if it wrote it."""
    match = _OF_RANK.fullmatch(name)
    return 0 if match is None else int(match.group(1)) % world_size
