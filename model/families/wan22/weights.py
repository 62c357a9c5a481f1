"""Weights of two experts as one: `high.<name>` and `low.<name>`, under official names."""

from __future__ import annotations

from pathlib import Path

import model.families.wan21.weights as transformers
from model.experts import SIDES
from model.families.wan21.folder import ModelFolder, holds_experts
from model.families.wan21.weights import one_side
from model.folders import loading
from model.types import Side
from utils.weights import JoinedWeights, Weights, WeightsError


def find_pair(path: Path, *, role: str, averaged: bool | None) -> Weights:
    """Both experts' weights at `path`, under official names whatever their names there.

    A model folder of two, or what `loading.open_weights` takes with names of both sides.
    """
    if path.is_dir() and holds_experts(path):
        found = {
            side: transformers.find_weights(path, role=role, averaged=averaged, side=side)
            for side in SIDES
        }
        return JoinedWeights(path, found)
    own = ModelFolder(path).weights
    weights = loading.open_weights(path, own, role=role, averaged=averaged)
    absent = [side for side in SIDES if not _holds(weights, side)]
    if absent:
        what = "one network" if len(absent) == 2 else f"no weights of the {absent[0]}-noise expert"
        raise WeightsError(
            f"{path}: holds {what}, where those of two experts are wanted; give a folder of both, "
            f"or a file whose names begin with high. and low."
        )
    return translated(weights, role)


def translated(weights: Weights, role: str) -> Weights:
    """`weights` with names of both sides, under official names."""
    sides = {
        side: transformers.translated(one_side(weights, side), role)
        for side in SIDES
        if _holds(weights, side)
    }
    return JoinedWeights(weights.path, sides)


def holds_sides(weights: Weights) -> bool:
    """Whether weights are named by their sides."""
    return any(_holds(weights, side) for side in SIDES)


def _holds(weights: Weights, side: Side) -> bool:
    return any(name.startswith(f"{side}.") for name in weights.shapes())
