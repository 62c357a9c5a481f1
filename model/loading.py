"""Networks from model folders, weight files and training checkpoints, sharded as they are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from model.discriminator import Discriminator, DiscriminatorConfig, DiscriminatorHeads
from model.folder import CONFIG, ModelFolder
from model.wan.config import WanConfig
from model.wan.transformer import WanTransformer, initial_value
from model.wan_wrapper import WanDiffusionWrapper
from utils import checkpoint
from utils.parallel import parallelize
from utils.seeding import generator
from utils.weights import (
    CheckpointWeights,
    WeightFile,
    Weights,
    WeightsError,
    check_fits,
    fill_weights,
    load_weights,
)


@dataclass(frozen=True)
class Placement:
    """Where a network goes and in which precision it lives."""

    device: torch.device
    storage: torch.dtype = torch.float32  # of the weights
    compute: torch.dtype = torch.float32  # of forward and backward
    mesh: DeviceMesh | None = None  # None = a whole copy on this device


def find_weights(path: Path, *, averaged: bool = False) -> Weights:
    """The transformer weights at `path`.

    A model folder, a weight file, a training checkpoint (step_N), or a log directory, whose newest
    checkpoint is meant. `averaged` asks for the EMA of a training checkpoint, ours or a .pt file;
    a WeightsError tells that there is none.
    """
    if path.is_file():
        return WeightFile(path, averaged=averaged)
    if (path / "checkpoints").is_dir():
        newest = checkpoint.latest(path / "checkpoints")
        if newest is None:
            raise WeightsError(f"{path}: a log directory without a whole checkpoint")
        path = newest
    if (path / ".metadata").is_file():
        fault = checkpoint.problem(path)
        if fault is not None:
            raise WeightsError(fault)
        return CheckpointWeights(path, averaged=averaged)
    if (path / CONFIG).is_file():
        found = ModelFolder(path).weights
        if found is not None:
            return WeightFile(found, averaged=averaged)
    raise WeightsError(
        f"{path}: no weights here; give a model folder, a .safetensors or .pt file, a training "
        f"checkpoint (checkpoints/step_N), or the log directory of a run"
    )


def check_weights(config: WanConfig, weights: Weights, *, what: str) -> None:
    """Raise WeightsError unless `weights` are those of a transformer of these sizes. Cheap."""
    with torch.device("meta"):
        check_fits(WanTransformer(config), weights, what=what)


def load_network(
    config: WanConfig, weights: Weights, place: Placement, *, what: str
) -> WanDiffusionWrapper:
    """A transformer with `weights`; each rank reads only what it keeps. `what` is for errors."""
    model = _empty(config, place)
    load_weights(model, weights, what=what)
    return WanDiffusionWrapper(model)


def random_network(config: WanConfig, seed: int, place: Placement) -> WanDiffusionWrapper:
    """A transformer with fresh weights, the same for any number of ranks."""
    model = _empty(config, place)
    fill_weights(
        model, lambda name, shape: initial_value(name, shape, generator(seed, "weights", name))
    )
    return WanDiffusionWrapper(model)


def random_discriminator(
    network: WanConfig, config: DiscriminatorConfig, seed: int, place: Placement
) -> Discriminator:
    """Heads with fresh weights for a network of these sizes, the same for any number of ranks."""
    with torch.device("meta"):
        heads = DiscriminatorHeads(network, config).to(place.storage)
    if place.mesh is not None:
        parallelize(heads, heads.blocks, place.mesh, place.compute)
    heads.to_empty(device=place.device)
    fill_weights(
        heads, lambda name, shape: initial_value(name, shape, generator(seed, "heads", name))
    )
    return Discriminator(heads)


def _empty(config: WanConfig, place: Placement) -> WanTransformer:
    with torch.device("meta"):
        model = WanTransformer(config).to(place.storage)
    if place.mesh is not None:
        parallelize(model, model.blocks, place.mesh, place.compute)
    model.to_empty(device=place.device)
    return model
