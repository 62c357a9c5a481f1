"""All methods in model/, found as the registry finds them: by being there."""

from __future__ import annotations

import importlib
import pkgutil

import model
from model.base import Method


def methods(base: type[Method] = Method) -> list[type[Method]]:
    """The classes below `base` that can be made, in the files of model/."""
    for module in pkgutil.iter_modules(model.__path__):
        importlib.import_module(f"model.{module.name}")
    below = [cls for child in base.__subclasses__() for cls in (child, *methods(child))]
    return [
        cls
        for cls in dict.fromkeys(below)
        if cls.__module__.startswith("model.") and not cls.__abstractmethods__
    ]
