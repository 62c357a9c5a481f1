"""Find a class by the name of the file that holds it, so that adding a method is adding a file."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

from utils.errors import UserError


def member_of(
    package: ModuleType,
    name: str,
    base: type,
    *,
    key: str,
    fits: Callable[[Any], bool] = lambda _: True,
) -> type:
    """The one subclass of `base` that module `name` of `package` defines and that `fits`.

    `key` is the configuration key that carried `name`; a ValueError quotes it with what is allowed.
    """
    modules = pkgutil.iter_modules(package.__path__)
    choices = sorted(module.name for module in modules if not module.ispkg)

    def one(choice: str) -> type | None:
        found = [cls for cls in _members(package, choice, base) if fits(cls)]
        return found[0] if len(found) == 1 else None

    found = one(name) if name in choices else None
    if found is not None:
        return found
    allowed = [choice for choice in choices if one(choice) is not None]
    near = difflib.get_close_matches(name, allowed, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise UserError(f"{key}: '{name}' is unknown, choose one of {', '.join(allowed)}{hint}")


def _members(package: ModuleType, name: str, base: type) -> list[type]:
    full = f"{package.__name__}.{name}"
    return [
        value
        for value in vars(importlib.import_module(full)).values()
        if isinstance(value, type)
        and issubclass(value, base)
        and value.__module__ == full
        and not getattr(value, "__abstractmethods__", None)
    ]
