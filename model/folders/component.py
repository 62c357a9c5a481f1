"""One part of a model folder, in a file of the official release or a diffusers sub-folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.weights import INDEX_SUFFIX, WeightFile, Weights, WeightsError, check_fits

CONFIG = "config.json"
STEMS = ("diffusion_pytorch_model", "model")  # of diffusers' weight files, and transformers'


class Renamed:
    """Weights under other names."""

    def __init__(self, weights: Weights, names: Mapping[str, str]) -> None:
        """names: new name -> name in `weights`."""
        self.path = weights.path
        self._weights = weights
        self._names = names

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, without reading it."""
        shapes = self._weights.shapes()
        return {new: shapes[old] for new, old in self._names.items()}

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Rows of one tensor along its first dimension."""
        return self._weights.read(self._names[name], rows)


def folder_weights(folder: Path) -> WeightFile:
    """The weights in a sub-folder of diffusers' layout. Raises WeightsError if it has none."""
    names = [f"{stem}{suffix}" for stem in STEMS for suffix in (INDEX_SUFFIX, ".safetensors")]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        present = sorted(path.name for path in folder.iterdir())
        raise WeightsError(f"{folder}: expected one of {', '.join(names)}, found {present}")
    return WeightFile(found)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object to look at, or nothing where there is none; whoever needs it says so."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def folder_config(folder: Path, *classes: str) -> dict[str, Any]:
    """config.json of a sub-folder, which must describe one of `classes`. Raises WeightsError."""
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder}: config.json is not readable: {error}") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{folder}: config.json must hold a JSON object")
    named = [values.get("_class_name"), *(values.get("architectures") or [])]
    if not set(classes).intersection(named):
        wanted = " or ".join(classes)
        raise WeightsError(f"{folder}: config.json must describe {wanted}, it names {named}")
    return values


@contextlib.contextmanager
def described(path: Path) -> Iterator[None]:
    """Build a network from sizes found at `path`. Raises WeightsError if they make none."""
    try:
        yield
    except Exception as error:  # each library and each bad value has a type of its own
        reason = " ".join(str(error).split())
        raise WeightsError(f"{path}: config.json describes no network: {reason}") from error


def fill(module: nn.Module, weights: Weights, dtype: torch.dtype, *, what: str) -> None:
    """Give a module on the meta device its weights as `dtype`, frozen, for evaluation.

    Raises WeightsError that lists missing and unexpected names, and other shapes.
    """
    check_fits(module, weights, what=what)
    state = {name: weights.read(name).to(dtype) for name in module.state_dict()}
    module.load_state_dict(state, assign=True)
    module.requires_grad_(False).eval()
