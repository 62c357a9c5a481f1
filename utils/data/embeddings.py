"""Text states on disk: a prompt is encoded once, and every later run reads the same bits.

A store is a folder with manifest.json and up to SHARDS LMDB shards. A prompt, to the character, is
hashed by SHA-256: the hash tells its shard, `p<hash>` holds the prompt as UTF-8, `s<hash>` its
states [rows, text_dim] as raw bytes of the dtype that they were computed in. Rows of zeros at the
end are left out. L: text_len, D: text_dim.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from utils.config import ConfigError
from utils.data.lmdb_files import begun, open_to_write, put
from utils.data.lmdb_reading import DamagedRecordError, LmdbReader
from utils.data.shards import shard_paths
from utils.errors import NotFoundError, UserError
from utils.records import DamagedError, read_manifest

FORMAT = 1  # of what is said above, and of how prompts are cleaned before they are encoded
SHARDS = 64  # so many processes can write to one store; changing it would hide what is stored
PROMPT, STATES = b"p", b"s"
SHOWN = 60  # characters of a prompt in a message


@dataclass(frozen=True)
class EmbeddingManifest:
    """What a store's states depend on, besides the prompts."""

    DESCRIBES: ClassVar[str] = "text embeddings"

    text_len: int
    text_dim: int
    dtype: str  # a name of torch's: float32, bfloat16
    encoder: str  # a hash of its weights
    tokenizer: str  # a hash of its files
    format: int = FORMAT

    def __post_init__(self) -> None:
        """Refuse what this version cannot read."""
        if self.format != FORMAT:
            raise DamagedError(
                f"of format {self.format}, this version reads {FORMAT}; make a new store"
            )


class EmbeddingReader:
    """The states of stored prompts. Nothing may write to the store while it is open."""

    def __init__(self, folder: Path) -> None:
        """Raises FileNotFoundError without a store, ValueError if part of it is damaged."""
        manifest = read_manifest(folder, EmbeddingManifest)
        if manifest is None:
            raise NotFoundError(
                f"{folder}: holds no text embeddings; make them with {_command(folder)}"
            )
        self.folder = folder
        self.manifest = manifest
        self.text_len = manifest.text_len
        self.text_dim = manifest.text_dim
        self.dtype: torch.dtype = getattr(torch, manifest.dtype)
        self._files = {path.name: LmdbReader(path) for path in shard_paths(folder) if begun(path)}

    def __enter__(self) -> EmbeddingReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files."""
        for file in self._files.values():
            file.close()

    def __call__(self, prompts: list[str]) -> Tensor:
        """[B, L, D], as the text encoder gives them one by one: same bits, zeros past the end.

        Raises ValueError if a prompt is not stored.
        """
        states = torch.zeros(len(prompts), self.text_len, self.text_dim, dtype=self.dtype)
        for rows, prompt in zip(states, prompts, strict=True):
            self._read(prompt, rows.view(torch.uint8).flatten().numpy())
        return states

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """Those that are not stored, each once, in their order. Reads no states."""
        absent: set[str] = set()
        for name, some in by_shard(prompts).items():
            file = self._files.get(name)
            absent.update(p for p in some if file is None or not self._holds(file, p))
        return [prompt for prompt in dict.fromkeys(prompts) if prompt in absent]

    def prompts(self) -> Iterator[str]:
        """All that are stored, in no order that means anything."""
        for file in self._files.values():
            for _, value in file.items(PROMPT):
                yield value.decode()

    def _read(self, prompt: str, into: np.ndarray) -> None:
        """Copy a prompt's states to the beginning of some bytes."""
        file, key = self._files.get(_shard(_hash(prompt))), STATES + _hash(prompt)
        if file is None or not self._holds(file, prompt):
            raise UserError(
                f"{self.folder}: holds no states of the prompt {_shown(prompt)}; add it with "
                f"{_command(self.folder)} (--prompt_path takes prompts beside the run's own)"
            )
        try:
            found = file.get(key) or b""
        except DamagedRecordError as error:
            raise self._damaged(prompt, error) from error
        if len(found) > len(into):
            raise self._damaged(prompt, f"{len(found)} bytes, at most {len(into)} are expected")
        into[: len(found)] = np.frombuffer(found, np.uint8)

    def _holds(self, file: LmdbReader, prompt: str) -> bool:
        """Whether a prompt's states are there; they are not read yet."""
        digest = _hash(prompt)
        try:
            there, found = file.get(PROMPT + digest), file.has(STATES + digest)
        except DamagedRecordError as error:
            raise self._damaged(prompt, error) from error
        if there is not None and there != prompt.encode():
            raise UserError(
                f"{self.folder}: holds another prompt under the hash of {_shown(prompt)}: "
                f"{_shown(there.decode(errors='replace'))}; reword one of them"
            )
        return found

    def _damaged(self, prompt: str, why: object) -> DamagedRecordError:
        return DamagedRecordError(
            f"{self.folder}: damaged where {_shown(prompt)} is stored: {why}; make it anew"
        )


class EmbeddingWriter:
    """Adds to one shard of a store, one process at a time. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        self._env = open_to_write(path)

    def __enter__(self) -> EmbeddingWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._env.close()

    def put(self, states: Mapping[str, Tensor]) -> None:
        """Store prompts of this shard (see `by_shard`) with their states [L, D]; durable.

        Raises OSError if the disk does not take them, and then the shard is as it was.
        """
        records = {}
        for prompt, rows in states.items():
            records[PROMPT + _hash(prompt)] = prompt.encode()
            records[STATES + _hash(prompt)] = _bytes(rows)
        put(self._env, records)


def by_shard(prompts: Sequence[str]) -> dict[str, list[str]]:
    """The prompts that belong into each shard, by its name, in their order."""
    shards: dict[str, list[str]] = {}
    for prompt in prompts:
        shards.setdefault(_shard(_hash(prompt)), []).append(prompt)
    return shards


def check_embeddings(
    reader: EmbeddingReader,
    prompts: Sequence[str],
    *,
    text_len: int,
    text_dim: int,
    dtype: torch.dtype,
) -> None:
    """Raise ConfigError unless a store has states of this kind for all prompts of a run."""
    wanted = {"text_len": text_len, "text_dim": text_dim, "dtype": dtype}
    other = [f"{k} {getattr(reader, k)}, here {v}" for k, v in wanted.items()
             if getattr(reader, k) != v]  # fmt: skip
    if other:
        raise ConfigError(
            f"data.text_embeddings: {reader.folder} was made with {'; '.join(other)}; make another "
            f"folder with {_command('<folder>')}"
        )
    missing = reader.missing(prompts)
    if missing:
        raise ConfigError(
            f"data.text_embeddings: {reader.folder} lacks {len(missing)} of this run's "
            f"{len(set(prompts))} prompts, the first of them {_shown(missing[0])}; add them with "
            f"{_command(reader.folder)}"
        )


def _command(folder: Path | str) -> str:
    return f"scripts/precompute_prompts.py --config_path <config> --output_path {folder}"


def _hash(prompt: str) -> bytes:
    return hashlib.sha256(prompt.encode()).digest()


def _shard(digest: bytes) -> str:
    return f"shard_{digest[0] % SHARDS:02d}"


def _shown(prompt: str) -> str:
    """A prompt on one line, shortened."""
    words = " ".join(prompt.split())
    return f"'{words}'" if len(words) <= SHOWN else f"'{words[:SHOWN]}...'"


def _bytes(states: Tensor) -> bytes:
    """The rows of [L, D] up to the last that is not zero."""
    filled = states.ne(0).any(dim=1).nonzero()
    rows = int(filled[-1]) + 1 if len(filled) else 0
    return states[:rows].contiguous().view(torch.uint8).numpy().tobytes()
