"""Which family a folder or a file is of; a new family is found by being in this package."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

from model import families
from model.families.base import Model
from model.folders.loading import open_weights
from utils.errors import NotFoundError, UserError
from utils.weights import Weights, WeightsError


def known_families() -> list[type[Model]]:
    """The families in this package; a more special one comes before what it is made of."""
    found: list[type[Model]] = []
    for module in pkgutil.iter_modules(families.__path__):
        name = f"{families.__name__}.{module.name}"
        found += [
            value
            for value in vars(importlib.import_module(name)).values()
            if isinstance(value, type)
            and issubclass(value, Model)
            and f"{value.__module__}.".startswith(f"{name}.")
            and not value.__abstractmethods__
        ]
    return sorted(dict.fromkeys(found), key=lambda cls: (-len(cls.__mro__), cls.family))


def open_model(path: Path) -> Model:
    """The model in the folder at `path`. Raises NotFoundError if no family knows it.

    Raises UserError that says what it is if a family knows it and cannot use it.
    """
    if path.is_file():
        raise UserError(
            f"{path}: is a file; a model is a folder, and weights in a file are named by `weights`"
        )
    families_ = known_families()
    for family in families_:
        fault = family.unsupported(path)
        if fault is not None:
            raise UserError(f"{path}: {fault}")
    for family in families_:
        if family.recognises(path):
            return family(path)
    names = ", ".join(family.family for family in families_)
    held = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else "no such folder"
    raise NotFoundError(f"{path}: no model of a known family ({names}): found {held}")


def find_model(root: Path, name: str) -> Model:
    """Model `name`: a path as it is, or a name below `root`.

    Raises NotFoundError that lists the models that are there, and what `open_model` raises.
    """
    for path in (Path(name), root / name):
        if path.exists():
            return open_model(path)
    present = sorted(path.name for path in _models(root))
    near = difflib.get_close_matches(name, present, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    ways = (family.how_to_get(root / name) for family in known_families())
    hint += "".join(f"; {way}" for way in list(filter(None, ways))[:1])
    found = f"it holds {present}" if present else "it holds no model"
    raise NotFoundError(f"model '{name}': no folder {root / name} ({found}){hint}")


def sketch_model(name: str, folder: Path) -> Model | None:
    """The released model `name` from what is known of it, described in `folder`; None = unknown."""
    described = folder / Path(name).name
    described.mkdir(exist_ok=True)
    if any(family.sketch(described.name, described) for family in known_families()):
        return open_model(described)
    return None


def _models(root: Path) -> Iterator[Path]:
    for path in root.iterdir() if root.is_dir() else ():
        if path.is_dir() and any(family.recognises(path) for family in known_families()):
            yield path


def check_model(
    model: Model, *, weights: bool = True, encoders: bool = True, text: bool = True
) -> None:
    """Raise NotFoundError that lists what is missing; see `Model.missing`."""
    model.check(weights=weights, encoders=encoders, text=text)


def recognised(path: Path) -> bool:
    """Whether the folder at `path` is a model's, complete or not."""
    return path.is_dir() and any(family.recognises(path) for family in known_families())


def identify_weights(
    path: Path, *, role: str = "generator", averaged: bool | None = False
) -> tuple[type[Model], Weights]:
    """Weights at `path` that come without a model folder: their family, and they by its names.

    The arguments are those of `Model.find_weights`. Raises WeightsError unless they hold what each
    denoiser of some family has.
    """
    if recognised(path):
        model = open_model(path)
        family, weights = type(model), model.find_weights(role=role, averaged=averaged)
    else:
        held = open_weights(path, None, role=role, averaged=averaged)
        family, weights = min(
            ((family, family.own_names(held, role)) for family in reversed(known_families())),
            key=lambda found: len(_absent(*found)),
        )
    absent = _absent(family, weights)
    if absent:
        raise WeightsError(
            f"{weights.path}: not a whole {family.network}: lacks {', '.join(absent)}; give a "
            f"model folder, the index of its shards, or a file that holds all weights"
        )
    return family, weights


def _absent(family: type[Model], weights: Weights) -> list[str]:
    held = weights.shapes()
    return [name for name in family.marks if name not in held]
