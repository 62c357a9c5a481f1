"""SHA-256 of files and folders: what tells weights and images from others under the same name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

CHUNK_BYTES = 2**24
SLOW_BYTES = 2**30  # less is hashed before a progress bar could be read


def content_hash(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of a folder's files, hidden ones left out."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(f for f in path.iterdir() if f.is_file() and not f.name.startswith("."))
    lines = "".join(f"{content_hash(file)} {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def sha256_of(files: Mapping[str, Path], what: str = "weights") -> dict[str, str]:
    """The SHA-256 of each file in hexadecimal, under the same names; large ones with a bar."""
    total = sum(path.stat().st_size for path in files.values())
    digests = {}
    with tqdm(
        total=total, desc=f"hashing {what}", unit="B", unit_scale=True, disable=total < SLOW_BYTES
    ) as bar:
        for name, path in files.items():
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    digest.update(chunk)
                    bar.update(len(chunk))
            digests[name] = digest.hexdigest()
    return digests
