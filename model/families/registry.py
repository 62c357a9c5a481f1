"""Which family a folder is of; a new family is found by being in this package."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

from model import families
from model.families.base import Model
from model.folders.foreign import refuse_foreign
from utils.errors import NotFoundError


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
            and value.__module__.startswith(name)
            and not getattr(value, "__abstractmethods__", None)
        ]
    return sorted(dict.fromkeys(found), key=lambda cls: -len(cls.__mro__))


def open_model(path: Path) -> Model:
    """The model in the folder at `path`. Raises FileNotFoundError if no family knows it."""
    for family in known_families():
        if family.recognises(path):
            return family(path)
    names = ", ".join(family.family for family in known_families())
    held = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else "no such folder"
    raise NotFoundError(f"{path}: no model of a known family ({names}): found {held}")


def find_model(root: Path, name: str) -> Model:
    """Model `name`: a path as it is, or a name below `root`.

    Raises FileNotFoundError that lists the models that are there.
    """
    for path in (Path(name), root / name):
        if path.is_dir():
            refuse_foreign(path)
            return open_model(path)
        if path.is_file():
            raise NotFoundError(f"model '{name}': {path} is a file; give the folder that it is in")
    present = sorted(path.name for path in _models(root))
    near = difflib.get_close_matches(name, present, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    found = f"it holds {present}" if present else "it holds no model"
    raise NotFoundError(f"model '{name}': no folder {root / name} ({found}){hint}")


def _models(root: Path) -> Iterator[Path]:
    for path in root.iterdir() if root.is_dir() else ():
        if path.is_dir() and any(family.recognises(path) for family in known_families()):
            yield path


def check_model(
    model: Model, *, weights: bool = True, encoders: bool = True, text: bool = True
) -> None:
    """Raise FileNotFoundError that lists what is missing; see `Model.missing`."""
    missing = model.missing(weights=weights, encoders=encoders, text=text)
    if missing:
        found = sorted(path.name for path in model.path.iterdir())
        raise NotFoundError(
            f"{model.path}: not a complete model folder: missing {'; '.join(missing)} "
            f"(found {found}); {model.fetch()}"
        )
