"""Networks of any family from weights on disk or fresh, sharded as they are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from model.adapters import RankOf, declare, parameter_names
from model.discriminator import (
    Discriminator,
    DiscriminatorConfig,
    DiscriminatorHeads,
    initial_value,
)
from model.folders.foreign import refuse_adapter, refuse_quantised
from model.types import FeatureSpec
from model.wan.heads import declare_heads
from utils import checkpoint
from utils.parallel import AS_IT_IS, ParallelConfig, parallelize
from utils.seeding import generator
from utils.weights import (
    CheckpointWeights,
    WeightFile,
    Weights,
    WeightsError,
    fill_weights,
)

M = TypeVar("M", bound=nn.Module)

_FOREIGN_CHECKPOINT = "model.pt"  # in a folder of its own, with all networks of a step


@dataclass(frozen=True)
class Placement:
    """Where a network goes and in which precision it lives."""

    device: torch.device
    storage: torch.dtype = torch.float32  # of the weights
    compute: torch.dtype = torch.float32  # of forward and backward
    mesh: DeviceMesh | None = None  # None = a whole copy on this device
    parallel: ParallelConfig = AS_IT_IS  # of a transformer's blocks
    context: DeviceMesh | None = None  # ranks that share a sample's tokens; None = there are none
    adapters: Mapping[str, RankOf] = field(default_factory=dict)  # that its layers get, by name
    whole: bool = False  # each rank holds all of it but for its adapters, which are laid over them
    # Of several networks of a model, those that are used as they are: stored as they compute.
    kept: Sequence[str] = ()

    # How many heads it ends with for the parts of a path (model.wan.heads), and whether beside its
    # own one. 0 = it ends as ever. Where weights are read, these tell.
    heads: int = 0
    plain: bool = False

    def side(self, name: str) -> Placement:
        """That of one of the networks that a model has under this name."""

        def within(rank_of: RankOf) -> RankOf:
            return lambda layer: rank_of(f"{name}.{layer}")

        return replace(
            self,
            storage=self.compute if name in self.kept else self.storage,
            adapters={k: within(ranks) for k, ranks in self.adapters.items()},
        )


def open_weights(
    path: Path, in_folder: Path | None, *, role: str, averaged: bool | None
) -> Weights:
    """A network's weights at `path`, under the names that they have there.

    A weight file, a training checkpoint (step_N), or a log directory, whose newest checkpoint is
    meant. in_folder: the file of weights, if `path` is a model folder that has one. role: of a
    checkpoint, ours or a .pt file with several networks: generator or critic. averaged: True = the
    generator's EMA, or a WeightsError; None = the EMA if there is one.
    """
    weights = open_any(path, in_folder, role=role, averaged=averaged)
    refuse_adapter(weights)
    if isinstance(weights, WeightFile):
        refuse_quantised(weights)
    return weights


def open_any(path: Path, in_folder: Path | None, *, role: str, averaged: bool | None) -> Weights:
    """The same, of a network or of an adapter."""
    if path.is_file():
        return WeightFile(path, role=role, averaged=averaged)
    if (path / "checkpoints").is_dir():
        newest = checkpoint.latest(path / "checkpoints")
        if newest is None:
            raise WeightsError(f"{path}: a log directory without a whole checkpoint")
        path = newest
    if (path / ".metadata").is_file():
        fault = checkpoint.problem(path)
        if fault is not None:
            raise WeightsError(fault)
        # A training checkpoint holds an average of the generator, always.
        prefer = role == "generator" if averaged is None else averaged
        return CheckpointWeights(path, role=role, averaged=prefer)
    if (path / _FOREIGN_CHECKPOINT).is_file():
        return WeightFile(path / _FOREIGN_CHECKPOINT, role=role, averaged=averaged)
    if in_folder is not None:
        return WeightFile(in_folder, role=role, averaged=averaged)
    raise WeightsError(
        f"{path}: no weights here; give a model folder, a .safetensors or .pt file, a training "
        f"checkpoint (checkpoints/step_N), or the log directory of a run"
    )


def empty(build: Callable[[], M], place: Placement) -> M:
    """A network without values, laid over the ranks; `build` makes it, with its `blocks`."""
    with torch.device("meta"):
        model = build().to(place.storage)
    declare(model, place.adapters)
    if place.heads:
        declare_heads(model, place.heads, plain=place.plain)
    parallelize(
        model,
        blocks_of(model),
        place.mesh,
        place.compute,
        place.parallel,
        context=place.context,
        added=[model.get_parameter(name) for name in parameter_names(model)],
        whole=place.whole,
    )
    model.to_empty(device=place.device)
    return model


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """What parallelism wraps one by one."""
    blocks = model.get_submodule("blocks")
    assert isinstance(blocks, nn.ModuleList), "a network has its layers in an nn.ModuleList"
    return blocks


def random_discriminator(
    features: FeatureSpec, config: DiscriminatorConfig, seed: int, place: Placement
) -> Discriminator:
    """Heads with fresh weights that read `features`, the same for any number of ranks."""
    heads = empty(lambda: DiscriminatorHeads(features, config), place)
    fill_weights(
        heads, lambda name, shape: initial_value(name, shape, generator(seed, "heads", name))
    )
    return Discriminator(heads)
