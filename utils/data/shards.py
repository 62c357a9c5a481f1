"""The one LMDB layout: a folder of shards, each with prompts and, where wanted, tensors.

In a shard, `<name>_shape` holds the row count and the shape of a row, `<name>_<row>_data` the row:
prompts as UTF-8, latents as float16 [F, C, H, W], trajectories (S states from noise to clean) as
float16 [S, F, C, H, W], img as uint8 [H, W, 3]. Everywhere else the channels come before the
frames. A shard has one shape per name; the shards of a folder may differ in it, but all hold
things of the same kinds.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.data.lmdb_files import allow_open, open_to_write, put, stored
from utils.data.lmdb_reading import DamagedRecordError, LmdbReader
from utils.errors import NotFoundError, UserError

PICTURES_TRIED = 16  # records of another system's shard that may tell the pictures' size


class ShardWriter:
    """Appends records to one shard. Use as a context manager; each `append` call is durable."""

    def __init__(self, path: Path) -> None:
        self._env = open_to_write(path)
        self._rows = (*self._shape("prompts"), 0)[0]

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
        images: Tensor | None = None,
    ) -> None:
        """Add rows; None = without.

        latents: [B, C, F, H, W]; trajectories: [B, S, C, F, H, W]; images: [B, 3, H, W], uint8.
        Raises ValueError if there is not one row per prompt, or their shape is new; OSError if the
        disk does not take them, and then the shard is as it was.
        """
        records = {b"prompts_shape": f"{self._rows + len(prompts)}".encode()}
        for i, prompt in enumerate(prompts):
            records[f"prompts_{self._rows + i}_data".encode()] = prompt.encode()
        for name, values in (("latents", latents), ("trajectories", trajectories)):
            if values is not None:
                self._check(name, values, len(prompts), _frames_first(self._row_shape(name)))
                stored = values.transpose(-4, -3).to(torch.float16)
                records |= self._tensor_records(name, stored)
        if images is not None:
            records |= self._image_records(images, len(prompts))
        put(self._env, records)
        self._rows += len(prompts)

    def _image_records(self, images: Tensor, count: int) -> dict[bytes, bytes]:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images must be uint8 [B, 3, H, W], got {images.dtype} {tuple(images.shape)}"
            )
        height, width, colours = self._row_shape("img") or (*images.shape[2:], 3)
        self._check("images", images, count, (colours, height, width))
        return self._tensor_records("img", images.permute(0, 2, 3, 1))

    def _check(self, name: str, values: Tensor, count: int, row: tuple[int, ...]) -> None:
        expected = (count, *(row or values.shape[1:]))
        if tuple(values.shape) != expected:
            raise ValueError(
                f"{name} must be {expected}, one row per prompt and all rows of a shard alike, "
                f"got {tuple(values.shape)}"
            )

    def _row_shape(self, name: str) -> tuple[int, ...]:
        return self._shape(name)[1:]

    def _shape(self, name: str) -> tuple[int, ...]:
        return _shape(Path(self._env.path()), name, stored(self._env, f"{name}_shape"))

    def _tensor_records(self, name: str, stored: Tensor) -> dict[bytes, bytes]:
        shape = " ".join(map(str, (self._rows + len(stored), *stored.shape[1:])))
        values = stored.contiguous().cpu().numpy()
        rows = {f"{name}_{self._rows + i}_data".encode(): r.tobytes() for i, r in enumerate(values)}
        return {f"{name}_shape".encode(): shape.encode(), **rows}


class Shard:
    """The records of one shard, by row. A shape is None if the shard holds no such thing.

    Its errors are ValueErrors that name the shard, and the key where one is to blame.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self._file = LmdbReader(path)
        self.rows = (*self._shape("prompts"), 0)[0]
        self.latent_shape = self._row_shape("latents", "F C H W", 4)  # [C, F, H, W]
        self.trajectory_shape = self._row_shape("trajectories", "S F C H W", 5)  # [S, C, F, H, W]
        self.image_shape = self._image_shape()  # (H, W)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What each record holds beside its prompt, and its shape."""
        shapes = {
            "latents": self.latent_shape,
            "trajectories": self.trajectory_shape,
            "images": self.image_shape,
        }
        return {kind: shape for kind, shape in shapes.items() if shape is not None}

    @property
    def kinds(self) -> list[str]:
        """What each record holds beside its prompt."""
        return list(self.shapes)

    def prompt(self, row: int) -> str:
        """The caption."""
        key, value = self._get(row, "prompts")
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise DamagedRecordError(
                f"{self.path}: '{key}' is not UTF-8 at byte {error.start}"
            ) from error

    def latents(self, row: int) -> Tensor:
        """The latents, [C, F, H, W], fp32."""
        return self._half_precision(row, "latents", self.latent_shape)

    def trajectory(self, row: int) -> Tensor:
        """The trajectory, [S, C, F, H, W], fp32."""
        return self._half_precision(row, "trajectories", self.trajectory_shape)

    def image(self, row: int) -> Tensor:
        """The picture, uint8 [3, H, W]."""
        assert self.image_shape is not None, "see that there are images before reading them"
        stored = self._array(row, "img", (*self.image_shape, 3), np.uint8)
        return torch.from_numpy(stored.copy()).permute(2, 0, 1)

    def _half_precision(self, row: int, name: str, shape: tuple[int, ...] | None) -> Tensor:
        assert shape is not None, f"see that there are {name} before reading them"
        stored = self._array(row, name, _frames_first(shape), np.float16)
        return torch.from_numpy(stored.astype(np.float32)).transpose(-4, -3)

    def _array(self, row: int, name: str, shape: Sequence[int], kind: type) -> np.ndarray:
        key, value = self._get(row, name)
        expected = int(np.prod(shape)) * np.dtype(kind).itemsize
        if len(value) != expected:
            words = " x ".join(map(str, shape))
            raise DamagedRecordError(
                f"{self.path}: '{key}' has {len(value)} bytes, expected {expected} for {words} of "
                f"{np.dtype(kind).name}"
            )
        return np.frombuffer(value, dtype=kind).reshape(shape)

    def _get(self, row: int, name: str) -> tuple[str, bytes]:
        key = f"{name}_{row}_data"
        value = self._file.get(key.encode())
        if value is None:
            raise DamagedRecordError(f"{self.path}: record {row} has no '{key}'")
        return key, value

    def _shape(self, name: str) -> tuple[int, ...]:
        return _shape(self.path, name, self._file.get(f"{name}_shape".encode()))

    def _row_shape(self, name: str, letters: str, dims: int) -> tuple[int, ...] | None:
        shape = self._shape(name)[1:]
        if not shape:
            return None
        if len(shape) != dims:
            raise UserError(
                f"{self.path}: '{name}_shape' must be N {letters}, got {len(shape) + 1} numbers"
            )
        return _frames_first(shape)

    def _image_shape(self) -> tuple[int, int] | None:
        shape = self._shape("img")
        if not shape:
            return None
        if len(shape) == 4 and shape[3] == 3:
            return shape[1], shape[2]
        # Another system's builder writes the latents' shape here too.
        if self.latent_shape is None:
            raise UserError(f"{self.path}: 'img_shape' must be N H W 3, got {shape}")
        return self._enlarged(*self.latent_shape[-2:])

    def _enlarged(self, height: int, width: int) -> tuple[int, int]:
        """The pictures' size, a multiple of the latents', from the bytes of the first whole one."""
        for row in range(min(self.rows, PICTURES_TRIED)):
            key, picture = self._get(row, "img")
            stride = math.isqrt(len(picture) // (3 * height * width))  # pixels to a latent
            if stride and 3 * height * width * stride**2 == len(picture):
                return stride * height, stride * width
        raise DamagedRecordError(
            f"{self.path}: '{key}' has {len(picture)} bytes, which make no picture of the shape of "
            f"the latents, {height} x {width}"
        )


class ShardReader:
    """Random access to the records of all shards in a folder, in the order of shard names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths = shard_paths(folder)
        allow_open(len(paths))
        shards = [Shard(path) for path in paths]
        if not shards:
            raise NotFoundError(f"{folder}: no LMDB shards (sub-folders with a data.mdb)")
        self.shards = [shard for shard in shards if shard.rows]
        if not self.shards:
            raise UserError(f"{folder}: its {len(shards)} LMDB shards hold no record")
        check_kinds(self.shards)
        self._first = [0, *accumulate(shard.rows for shard in self.shards)]

    def __len__(self) -> int:
        return self._first[-1]

    def prompt(self, index: int) -> str:
        """The caption of record `index`."""
        shard, row = self._locate(index)
        return shard.prompt(row)

    def latents(self, index: int) -> Tensor:
        """The latents of record `index`, [C, F, H, W], fp32."""
        shard, row = self._locate(index)
        return shard.latents(row)

    def trajectory(self, index: int) -> Tensor:
        """The trajectory of record `index`, [S, C, F, H, W], fp32."""
        shard, row = self._locate(index)
        return shard.trajectory(row)

    def image(self, index: int) -> Tensor:
        """The picture of record `index`, uint8 [3, H, W]."""
        shard, row = self._locate(index)
        return shard.image(row)

    def latent_shape(self, index: int) -> tuple[int, ...] | None:
        """[C, F, H, W] of record `index`, from memory; None without latents."""
        return self._locate(index)[0].latent_shape

    def trajectory_shape(self, index: int) -> tuple[int, ...] | None:
        """[S, C, F, H, W] of record `index`, from memory; None without trajectories."""
        return self._locate(index)[0].trajectory_shape

    def image_shape(self, index: int) -> tuple[int, int] | None:
        """(H, W) of the picture of record `index`, from memory; None without pictures."""
        return self._locate(index)[0].image_shape

    def _locate(self, index: int) -> tuple[Shard, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.folder}: no record {index}, it holds {len(self)}")
        number = bisect_right(self._first, index) - 1
        return self.shards[number], index - self._first[number]


def check_kinds(shards: Sequence[Shard]) -> None:
    """Raise ValueError, with two shards' names, unless all hold things of the same kinds."""
    for shard in shards:
        if shard.kinds != shards[0].kinds:
            one, other = (f"{s.name} {_listed(s.kinds)}" for s in (shards[0], shard))
            raise UserError(
                f"{shard.path.parent}: shards of different kinds: {one}, {other}; keep them in "
                f"folders of their own"
            )


def _listed(kinds: Sequence[str]) -> str:
    return f"holds prompts, {', '.join(kinds)}" if kinds else "holds prompts alone"


def shard_paths(folder: Path) -> list[Path]:
    """The shards of a folder, sorted by name; the folder itself if it is one."""
    if (folder / "data.mdb").is_file():
        return [folder]
    return sorted(path.parent for path in folder.glob("*/data.mdb"))


def _frames_first(shape: Sequence[int]) -> tuple[int, ...]:
    """[..., C, F, H, W] as it is stored, [..., F, C, H, W]; and back."""
    if not shape:
        return ()
    *rest, first, second, height, width = shape
    return (*rest, second, first, height, width)


def _shape(shard: Path, name: str, value: bytes | None) -> tuple[int, ...]:
    """What a shard holds under `<name>_shape`; empty if it has no such key."""
    try:
        return tuple(int(word) for word in (value or b"").split())
    except ValueError as error:
        assert value is not None
        raise UserError(
            f"{shard}: '{name}_shape' must hold whole numbers, got {value[:40]!r}"
        ) from error
