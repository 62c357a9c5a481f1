"""Networks from model folders, weight files and training checkpoints, sharded as they are read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from model.discriminator import Discriminator, DiscriminatorConfig, DiscriminatorHeads
from model.folders.component import Renamed
from model.folders.folder import ModelFolder
from model.folders.foreign import refuse_adapter, refuse_foreign
from model.types import FeatureSpec
from model.wan.config import WanConfig
from model.wan.transformer import WanTransformer, initial_value
from model.wan.weights import to_official
from model.wan_wrapper import WanDiffusionWrapper
from utils import checkpoint
from utils.parallel import parallelize
from utils.seeding import generator
from utils.weights import (
    CheckpointWeights,
    MissingFilesError,
    WeightFile,
    Weights,
    WeightsError,
    check_fits,
    fill_weights,
    load_weights,
)

log = logging.getLogger(__name__)

# What the critics of other systems' GAN trainers hold beside a transformer.
_FOREIGN_HEADS = ("_cls_pred_branch.", "_register_tokens.", "_gan_ca_blocks.")
_FOREIGN_CHECKPOINT = "model.pt"  # in a folder of its own, with all networks of a step


@dataclass(frozen=True)
class Placement:
    """Where a network goes and in which precision it lives."""

    device: torch.device
    storage: torch.dtype = torch.float32  # of the weights
    compute: torch.dtype = torch.float32  # of forward and backward
    mesh: DeviceMesh | None = None  # None = a whole copy on this device
    recompute: bool = False  # whether a transformer's blocks run again in the backward pass


def find_weights(path: Path, *, role: str = "generator", averaged: bool | None = False) -> Weights:
    """The transformer weights at `path`, under official names whatever their names there.

    A model folder, a weight file, a training checkpoint (step_N), or a log directory, whose newest
    checkpoint is meant; in official or diffusers' names, with or without the prefixes of wrappers.
    role: of a checkpoint, ours or a .pt file with several networks: generator or critic.
    averaged: True = the generator's EMA, or a WeightsError; None = the EMA if there is one.
    """
    weights = _open(path, role, averaged)
    refuse_adapter(weights)
    return _translated(weights, role)


def _open(path: Path, role: str, averaged: bool | None) -> Weights:
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
    folder = ModelFolder(path)
    if folder.weights is not None:
        try:
            return WeightFile(folder.weights, role=role, averaged=averaged)
        except MissingFilesError as error:
            raise WeightsError(f"{error}; {folder.fetch()}") from error
    refuse_foreign(path)
    raise WeightsError(
        f"{path}: no weights here; give a model folder, a .safetensors or .pt file, a training "
        f"checkpoint (checkpoints/step_N), or the log directory of a run"
    )


def _translated(weights: Weights, role: str) -> Weights:
    """`weights` under official names; those of a foreign critic without its GAN heads."""
    held = list(weights.shapes())
    foreign = [name for name in held if name.startswith(_FOREIGN_HEADS)]
    if role == "critic" and foreign:
        log.info(
            "%s: left out the %d weights of its GAN heads (%s, ...): they fit no other trainer",
            weights.path,
            len(foreign),
            foreign[0],
        )
        held = [name for name in held if name not in foreign]
    names = {to_official(name): name for name in held}
    if len(names) < len(held):
        raise WeightsError(f"{weights.path}: holds weights twice, under official and other names")
    unchanged = len(held) == len(weights.shapes()) and all(old == new for new, old in names.items())
    return weights if unchanged else Renamed(weights, names)


def check_weights(config: WanConfig, weights: Weights, *, what: str) -> None:
    """Raise WeightsError unless `weights` are those of a transformer of these sizes. Cheap.

    The message says what architecture the weights look like.
    """
    with torch.device("meta"):
        model = WanTransformer(config)
    try:
        check_fits(model, weights, what=what)
    except WeightsError as error:
        expected = _architecture({name: tuple(v.shape) for name, v in model.state_dict().items()})
        found = _architecture(weights.shapes())
        raise WeightsError(f"{error} They look like {found}; expected {expected}") from error


def _architecture(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The sizes of the transformer that weights of these shapes make."""
    patch, ffn = shapes.get("patch_embedding.weight"), shapes.get("blocks.0.ffn.0.weight")
    if patch is None or ffn is None or len(patch) != 5:
        return "no Wan transformer"
    layers = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    kind = "t2v"
    if "blocks.0.cross_attn.k_img.weight" in shapes:
        kind = "flf2v" if "img_emb.emb_pos" in shapes else "i2v"
    return f"{kind} with dim {patch[0]}, ffn_dim {ffn[0]}, {len(layers)} layers, in_dim {patch[1]}"


def load_network(
    config: WanConfig, weights: Weights, place: Placement, *, what: str
) -> WanDiffusionWrapper:
    """A transformer with `weights`; each rank reads only what it keeps. `what` is for errors."""
    check_weights(config, weights, what=what)
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
    features: FeatureSpec, config: DiscriminatorConfig, seed: int, place: Placement
) -> Discriminator:
    """Heads with fresh weights for a network of these sizes, the same for any number of ranks."""
    with torch.device("meta"):
        heads = DiscriminatorHeads(features, config).to(place.storage)
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
        parallelize(model, model.blocks, place.mesh, place.compute, recompute=place.recompute)
    model.to_empty(device=place.device)
    return model
