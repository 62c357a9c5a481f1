"""Training data: prompts from a file, a folder or LMDB shards, latents from shards, one order."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from utils.lmdb import ShardReader, shard_paths
from utils.seeding import generator


@dataclass(frozen=True, eq=False)
class RawItem:
    """One record before the encoders."""

    prompt: str
    latents: Tensor | None = None  # [C, F, H, W], fp32
    trajectory: Tensor | None = None  # [S, C, F, H, W], fp32, noise to clean


class Dataset(Protocol):
    """Random access to records."""

    latent_shape: tuple[int, ...] | None  # [C, F, H, W], or None without latents
    trajectory_shape: tuple[int, ...] | None  # [S, C, F, H, W], or None without trajectories

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> RawItem: ...


class Prompts:
    """Captions alone, in memory."""

    latent_shape: tuple[int, ...] | None = None
    trajectory_shape: tuple[int, ...] | None = None

    def __init__(self, prompts: list[str]) -> None:
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> RawItem:
        return RawItem(self.prompts[index])


class LatentShards:
    """Captions from LMDB shards, with the latents and trajectories that they hold, if any."""

    def __init__(self, folder: Path) -> None:
        self._reader = ShardReader(folder)
        self.latent_shape = self._reader.latent_shape
        self.trajectory_shape = self._reader.trajectory_shape

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> RawItem:
        reader = self._reader
        latents = None if self.latent_shape is None else reader.latents(index)
        trajectory = None if self.trajectory_shape is None else reader.trajectory(index)
        return RawItem(reader.prompt(index), latents, trajectory)


@dataclass(frozen=True)
class TrajectoryManifest:
    """How the ODE pairs of a folder were made; also what tells a run that continues from others."""

    count: int  # pairs when it is finished
    denoising_step_list: list[int]  # the states that are kept, noise first; the end comes last
    timestep_shift: float
    latent_shape: list[int]  # [C, F, H, W]
    steps: int  # Euler steps of the teacher
    cfg_scale: float
    seed: int
    prompts: str  # a hash of them
    negative_prompt: str
    mixed_precision: bool
    weights: str  # where the teacher came from


def manifest_path(folder: Path) -> Path:
    """Where a folder of ODE pairs says how it was made."""
    return folder / "manifest.json"


def read_manifest(folder: Path) -> TrajectoryManifest | None:
    """The manifest of a folder of ODE pairs, or None. Raises ValueError if it is damaged."""
    path = manifest_path(folder)
    if not path.is_file():
        return None
    try:
        return TrajectoryManifest(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a manifest of ODE pairs: {error}") from error


def open_dataset(path: Path) -> Dataset:
    """Open what lies at `path`: a prompt file, a folder of .txt files, or a folder of shards.

    Raises FileNotFoundError or ValueError with what was expected there.
    """
    if path.is_file():
        return Prompts(read_prompt_file(path))
    if shard_paths(path):
        return LatentShards(path)
    if manifest_path(path).is_file():
        raise FileNotFoundError(
            f"{path}: has a manifest of ODE pairs but no pair yet; run "
            f"scripts/generate_ode_pairs.py again"
        )
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: no such data; give a .txt file with one prompt per line, a folder of .txt "
            f"files with one prompt each, or a folder of LMDB shards"
        )
    return Prompts(read_prompt_folder(path))


def read_prompt_file(path: Path) -> list[str]:
    """One prompt per line, UTF-8; blank lines are skipped. Raises ValueError if none is left."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such prompt file (one prompt per line)")
    prompts = [line.strip() for line in _read_utf8(path).split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"{path}: holds no prompt; write one per line")
    return prompts


def read_prompt_folder(folder: Path) -> list[str]:
    """The whole content of each .txt file as one prompt, in the order of file names."""
    files = sorted(folder.glob("*.txt"))
    prompts = [text for text in (_read_utf8(file).strip() for file in files) if text]
    if not prompts:
        raise ValueError(
            f"{folder}: holds no prompt: {len(files)} .txt files, all empty; "
            f"expected .txt files with one prompt each, or LMDB shards"
        )
    return prompts


def _read_utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error


class DataOrder:
    """Which record the n-th draw of a run takes: a new permutation each epoch, from the seed."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self._permutation = functools.lru_cache(maxsize=2)(
            lambda epoch: torch.randperm(size, generator=generator(seed, "epoch", epoch)).tolist()
        )

    def __getitem__(self, draw: int) -> int:
        return self._permutation(draw // self.size)[draw % self.size]
