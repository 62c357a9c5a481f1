"""The one LMDB layout: a folder of shards, each with prompts and, where wanted, tensors.

In a shard, `<name>_shape` holds the row count and the shape of a row, `<name>_<row>_data` the row:
prompts as UTF-8, latents as float16 [F, C, H, W], trajectories (S states from noise to clean) as
float16 [S, F, C, H, W]. Everywhere else the channels come before the frames.
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

    @property
    def rows(self) -> int:
        """How many rows the shard holds."""
        return self._rows

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._env.close()

    def append(
        self,
        prompts: Sequence[str],
        latents: Tensor | None = None,
        trajectories: Tensor | None = None,
    ) -> None:
        """Add rows. latents: [B, C, F, H, W]; trajectories: [B, S, C, F, H, W]; None = without.

        Raises ValueError if there is not one row per prompt, or their shape is new.
        """
        records = {b"prompts_shape": f"{self._rows + len(prompts)}".encode()}
        for i, prompt in enumerate(prompts):
            records[f"prompts_{self._rows + i}_data".encode()] = prompt.encode()
        for name, values in (("latents", latents), ("trajectories", trajectories)):
            if values is not None:
                records |= self._tensor_records(name, values, len(prompts))
        while not self._put(records):
            self._env.set_mapsize(self._env.info()["map_size"] * GROWTH)
        self._rows += len(prompts)

    def _tensor_records(self, name: str, values: Tensor, count: int) -> dict[bytes, bytes]:
        expected = (count, *(_frames_first(_shape(self._env, name)[1:]) or values.shape[1:]))
        if tuple(values.shape) != expected:
            raise ValueError(
                f"{name} must be {expected}, one row per prompt and all rows of a shard alike, "
                f"got {tuple(values.shape)}"
            )
        stored = values.transpose(-4, -3).to(torch.float16).contiguous().numpy()
        shape = " ".join(map(str, (self._rows + count, *stored.shape[1:])))
        rows = {f"{name}_{self._rows + i}_data".encode(): r.tobytes() for i, r in enumerate(stored)}
        return {f"{name}_shape".encode(): shape.encode(), **rows}

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
        self.latent_shape = self._common_shape("latents")
        self.trajectory_shape = self._common_shape("trajectories")

    def __len__(self) -> int:
        return int(self._first[-1])

    def prompt(self, index: int) -> str:
        """The caption of record `index`."""
        return self._get(index, "prompts").decode()

    def latents(self, index: int) -> Tensor:
        """The latents of record `index`, [C, F, H, W], fp32."""
        return self._tensor(index, "latents", self.latent_shape)

    def trajectory(self, index: int) -> Tensor:
        """The trajectory of record `index`, [S, C, F, H, W], fp32."""
        return self._tensor(index, "trajectories", self.trajectory_shape)

    def _tensor(self, index: int, name: str, shape: tuple[int, ...] | None) -> Tensor:
        assert shape is not None, f"see that there are {name} before reading them"
        stored = np.frombuffer(self._get(index, name), dtype=np.float16)
        rows = stored.astype(np.float32).reshape(_frames_first(shape))
        return torch.from_numpy(rows).transpose(-4, -3)

    def _get(self, index: int, name: str) -> bytes:
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        key = f"{name}_{index - self._first[shard]}_data"
        with self._envs[shard].begin() as transaction:
            value = transaction.get(key.encode())
        if value is None:
            raise ValueError(f"{self.folder}: record {index} has no '{key}'")
        return bytes(value)

    def _common_shape(self, name: str) -> tuple[int, ...] | None:
        """[..., C, F, H, W] of every record, or None if the shards hold no such thing."""
        found = {_shape(env, name)[1:] for env in self._envs}
        if found == {()}:
            return None
        if len(found) > 1:
            raise ValueError(f"{self.folder}: shards hold {name} of several shapes: {found}")
        return _frames_first(found.pop())


def shard_paths(folder: Path) -> list[Path]:
    """The shards of a folder, sorted by name."""
    return sorted(path.parent for path in folder.glob("*/data.mdb"))


def _frames_first(shape: Sequence[int]) -> tuple[int, ...]:
    """[..., C, F, H, W] as it is stored, [..., F, C, H, W]; and back."""
    if not shape:
        return ()
    *rest, first, second, height, width = shape
    return (*rest, second, first, height, width)


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
