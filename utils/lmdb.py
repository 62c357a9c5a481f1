"""The one LMDB layout: a folder of shards, each with prompts and, where wanted, latents.

In a shard, `<name>_shape` holds the row count and the shape of a row, `<name>_<row>_data` the row:
prompts as UTF-8, latents as float16 [F, C, H, W]. Everywhere else latents are [C, F, H, W].
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lmdb
import numpy as np
import torch
from torch import Tensor

GROWTH = 2  # a full map is reopened this many times larger
FIRST_MAP_BYTES = 64 * 2**20


class ShardWriter:
    """Appends records to one shard. Use as a context manager; each `append` call is durable."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self._env = lmdb.open(str(path), map_size=FIRST_MAP_BYTES, subdir=True, lock=False)
        self._rows = _rows(self._env)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._env.close()

    def append(self, prompts: Sequence[str], latents: Tensor | None = None) -> None:
        """Add rows. latents: [B, C, F, H, W], one per prompt, or None for prompts alone.

        Raises ValueError if there is not one row of latents per prompt, or their shape is new.
        """
        records = {b"prompts_shape": f"{self._rows + len(prompts)}".encode()}
        for i, prompt in enumerate(prompts):
            records[f"prompts_{self._rows + i}_data".encode()] = prompt.encode()
        if latents is not None:
            stored = latents.transpose(1, 2).to(torch.float16).contiguous().numpy()
            frames, channels, *area = _shape(self._env, "latents")[1:] or stored.shape[1:]
            if stored.shape != (len(prompts), frames, channels, *area):
                raise ValueError(
                    f"latents must be {(len(prompts), channels, frames, *area)}, one row per "
                    f"prompt and all rows of a shard alike, got {tuple(latents.shape)}"
                )
            shape = " ".join(map(str, (self._rows + len(prompts), *stored.shape[1:])))
            records[b"latents_shape"] = shape.encode()
            for i, row in enumerate(stored):
                records[f"latents_{self._rows + i}_data".encode()] = row.tobytes()
        while not self._put(records):
            self._env.set_mapsize(self._env.info()["map_size"] * GROWTH)
        self._rows += len(prompts)

    def _put(self, records: dict[bytes, bytes]) -> bool:
        try:
            with self._env.begin(write=True) as transaction:
                for key, value in records.items():
                    transaction.put(key, value)
        except lmdb.MapFullError:
            return False
        return True


class ShardReader:
    """Random access to the records of all shards in a folder, in the order of shard names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._envs = [_open(path) for path in shard_paths(folder)]
        if not self._envs:
            raise FileNotFoundError(f"{folder}: no LMDB shards (sub-folders with a data.mdb)")
        self._first = np.cumsum([0] + [_rows(env) for env in self._envs])
        if not len(self):
            raise ValueError(f"{folder}: its {len(self._envs)} LMDB shards hold no record")
        self.latent_shape = self._latent_shape()

    def __len__(self) -> int:
        return int(self._first[-1])

    def prompt(self, index: int) -> str:
        """The caption of record `index`."""
        return self._get(index, "prompts").decode()

    def latents(self, index: int) -> Tensor:
        """The latents of record `index`, [C, F, H, W], fp32."""
        assert self.latent_shape is not None, "check latent_shape before reading latents"
        channels, frames, height, width = self.latent_shape
        stored = np.frombuffer(self._get(index, "latents"), dtype=np.float16)
        rows = stored.astype(np.float32).reshape(frames, channels, height, width)
        return torch.from_numpy(rows).transpose(0, 1)

    def _get(self, index: int, name: str) -> bytes:
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        key = f"{name}_{index - self._first[shard]}_data"
        with self._envs[shard].begin() as transaction:
            value = transaction.get(key.encode())
        if value is None:
            raise ValueError(f"{self.folder}: record {index} has no '{key}'")
        return bytes(value)

    def _latent_shape(self) -> tuple[int, int, int, int] | None:
        """[C, F, H, W] of every record, or None if the shards hold prompts alone."""
        found = {_shape(env, "latents")[1:] for env in self._envs}
        if found == {()}:
            return None
        if len(found) > 1:
            raise ValueError(f"{self.folder}: shards hold latents of several shapes: {found}")
        frames, channels, height, width = found.pop()
        return channels, frames, height, width


def shard_paths(folder: Path) -> list[Path]:
    """The shards of a folder, sorted by name."""
    return sorted(path.parent for path in folder.glob("*/data.mdb"))


def _open(path: Path) -> lmdb.Environment:
    try:
        env = lmdb.open(str(path), readonly=True, lock=False, readahead=False, subdir=True)
    except lmdb.Error as error:
        raise ValueError(f"{path}: not readable as LMDB: {error}") from error
    # LMDB maps the file into memory: reading past the end of a cut one kills the process.
    size, whole = (path / "data.mdb").stat().st_size, _used_bytes(env)
    if size < whole:
        raise ValueError(f"{path}: cut off, data.mdb has {size} of {whole} bytes; copy it again")
    return env


def _used_bytes(env: lmdb.Environment) -> int:
    return (env.info()["last_pgno"] + 1) * env.stat()["psize"]


def _shape(env: lmdb.Environment, name: str) -> tuple[int, ...]:
    with env.begin() as transaction:
        value = transaction.get(f"{name}_shape".encode())
    return tuple(int(word) for word in bytes(value).split()) if value else ()


def _rows(env: lmdb.Environment) -> int:
    shape = _shape(env, "prompts")
    return shape[0] if shape else 0
