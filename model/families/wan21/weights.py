"""Weights of Wan2.1 transformers: found anywhere, under official names, told by their sizes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from model.adapters import parameter_names
from model.families.wan21.folder import ModelFolder
from model.folders import loading
from model.folders.component import Renamed
from model.folders.loading import Placement
from model.wan.config import WanConfig
from model.wan.transformer import WanTransformer, initial_value
from model.wan.weights import to_official
from model.wan_wrapper import WanDiffusionWrapper
from utils.seeding import generator
from utils.weights import (
    MissingFilesError,
    Weights,
    WeightsError,
    check_fits,
    fill_weights,
    load_weights,
)

log = logging.getLogger(__name__)

# What the critics of other systems' GAN trainers hold beside a transformer.
_FOREIGN_HEADS = ("_cls_pred_branch.", "_register_tokens.", "_gan_ca_blocks.")


def find_weights(path: Path, *, role: str = "generator", averaged: bool | None = False) -> Weights:
    """The transformer weights at `path`, under official names whatever their names there.

    A model folder, or what `loading.open_weights` takes; in official or diffusers' names, with or
    without the prefixes of wrappers.
    """
    folder = ModelFolder(path)
    try:
        weights = loading.open_weights(path, folder.weights, role=role, averaged=averaged)
    except MissingFilesError as error:
        if folder.weights is None:
            raise
        raise WeightsError(f"{error}; {folder.fetch()}") from error
    return translated(weights, role)


def translated(weights: Weights, role: str) -> Weights:
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
    model = loading.empty(lambda: WanTransformer(config), place)
    load_weights(model, weights, what=what, without=parameter_names(model))
    return WanDiffusionWrapper(model)


def random_network(config: WanConfig, seed: int, place: Placement) -> WanDiffusionWrapper:
    """A transformer with fresh weights, the same for any number of ranks."""
    model = loading.empty(lambda: WanTransformer(config), place)
    added = set(parameter_names(model))
    fill_weights(
        model,
        lambda name, shape: initial_value(name, shape, generator(seed, "weights", name)),
        [name for name in model.state_dict() if name not in added],
    )
    return WanDiffusionWrapper(model)
