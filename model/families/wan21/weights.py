"""Weights of Wan transformers: found anywhere, under official names, told by their sizes."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from model.adapters import parameter_names
from model.experts import SIDES
from model.families.wan21.folder import HOMES, ModelFolder, holds_experts
from model.folders import loading
from model.folders.component import Renamed
from model.folders.loading import Placement
from model.types import Side
from model.wan.config import GIVEN_CHANNELS, TI2V_CHANNELS, WanConfig
from model.wan.heads import PLAIN_WEIGHT, count_heads, declare_heads
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


def find_weights(
    path: Path,
    *,
    role: str = "generator",
    averaged: bool | None = False,
    side: Side | None = None,
) -> Weights:
    """The transformer weights at `path`, under official names whatever their names there.

    A model folder, or what `loading.open_weights` takes; in official or diffusers' names, with or
    without the prefixes of wrappers. side: whose, where there may be those of two experts.
    """
    weights = _of_one(path, side, role, averaged)
    return translated(weights if side is None else one_side(weights, side), role)


def _of_one(path: Path, side: Side | None, role: str, averaged: bool | None) -> Weights:
    pair = path.is_dir() and holds_experts(path)
    if pair and side is None:
        raise WeightsError(
            f"{path}: holds two transformers, the experts of high and of low noise levels, where "
            f"one is wanted; name the folder or the index of one of them: {_homes(path)}"
        )
    folder = ModelFolder(path, side=side if pair else None)
    if pair and folder.weights is None:
        places = " or ".join(HOMES[side])
        raise WeightsError(
            f"{path}: lacks the weights of the {side}-noise expert ({places}); {folder.fetch()}"
        )
    try:
        return loading.open_weights(path, folder.weights, role=role, averaged=averaged)
    except MissingFilesError as error:
        if folder.weights is None:
            raise
        raise WeightsError(f"{error}; {folder.fetch()}") from error


def _homes(path: Path) -> str:
    """Where the two transformers of a folder are."""
    sides = (ModelFolder(path, side=side) for side in SIDES)
    return ", ".join(str(side.weights.parent) for side in sides if side.weights is not None)


def one_side(weights: Weights, side: Side) -> Weights:
    """One expert's of `weights`, under plain names; those of a single network as they are."""
    prefix = f"{side}."
    names = {
        name.removeprefix(prefix): name for name in weights.shapes() if name.startswith(prefix)
    }
    return Renamed(weights, names) if names else weights


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
    heads, plain = heads_in(weights)
    if heads:
        declare_heads(model, heads, plain=plain)
    try:
        check_fits(model, weights, what=what)
    except WeightsError as error:
        expected = _architecture({name: tuple(v.shape) for name, v in model.state_dict().items()})
        found = _architecture(weights.shapes())
        raise WeightsError(f"{error} They look like {found}; expected {expected}") from error


def heads_in(weights: Weights) -> tuple[int, bool]:
    """How many heads for parts of a path `weights` have, and whether a plain one too."""
    shapes = weights.shapes()
    return count_heads(shapes), PLAIN_WEIGHT in shapes


def _architecture(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The sizes of the transformer that weights of these shapes make."""
    patch, ffn = shapes.get("patch_embedding.weight"), shapes.get("blocks.0.ffn.0.weight")
    if all(f"{side}.patch_embedding.weight" in shapes for side in SIDES):
        return "two Wan transformers, experts of high and low noise levels"
    if patch is None or ffn is None or len(patch) != 5:
        return "no Wan transformer"
    layers = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    sizes = f"dim {patch[0]}, ffn_dim {ffn[0]}, {len(layers)} layers, in_dim {patch[1]}"
    return f"{_kind(shapes, patch)} with {sizes}"


def _kind(shapes: Mapping[str, tuple[int, ...]], patch: tuple[int, ...]) -> str:
    """The model type of a transformer, by its image branch and its channels."""
    if "blocks.0.cross_attn.k_img.weight" in shapes:
        return "flf2v" if "img_emb.emb_pos" in shapes else "i2v"
    outside = shapes.get("head.head.weight", (0,))[0] // math.prod(patch[2:])
    if outside == TI2V_CHANNELS:
        return "ti2v"
    return "i2v without CLIP" if patch[1] - outside >= GIVEN_CHANNELS else "t2v"


def load_network(
    config: WanConfig, weights: Weights, place: Placement, *, what: str
) -> WanDiffusionWrapper:
    """A transformer with `weights`; each rank reads only what it keeps. `what` is for errors."""
    check_weights(config, weights, what=what)
    heads, plain = heads_in(weights)
    place = replace(place, heads=heads, plain=plain)
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
