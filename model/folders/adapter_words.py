"""Adapters as users name them, path[:strength], and weights with what adapters add to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.folders.adapter_files import EXPERTS, AdapterFile, check_adapter, read_adapter
from utils.errors import NotFoundError, UserError
from utils.weights import Weights

FORM = "PATH[:STRENGTH]"
HELP = (
    "a LoRA on top of the weights: a file in any layout, or a run that trained one; may be given "
    "several times; for one expert of two: high=PATH, low=PATH"
)
_EXPLAINED = f"the form is {FORM}, with high= or low= before it for an expert of Wan2.2 A14B"


@dataclass(frozen=True)
class AdapterWord:
    """One adapter and how much of it."""

    path: Path
    strength: float = 1.0
    expert: str | None = None  # high or low; None = as its file says, or the one network
    averaged: bool | None = None  # of a checkpoint the average; None = if there is one

    def __str__(self) -> str:
        side = f"{self.expert}=" if self.expert else ""
        return f"{side}{self.path}:{self.strength:g}"

    def read(self, *, role: str = "generator") -> AdapterFile:
        """What it adds, with its strength. Raises WeightsError; see `read_adapter`."""
        adapter = read_adapter(self.path, role=role, averaged=self.averaged)
        if self.strength != 1.0:
            adapter = adapter.scaled(self.strength)
        return adapter if self.expert is None else adapter.of_expert(self.expert)


def adapter_word(word: str) -> AdapterWord:
    """Read path[:strength] with an expert before it, if any; a relative path is of this folder.

    Raises NotFoundError or UserError for what names no adapter.
    """
    found = parse(word)
    if not found.path.exists():
        raise NotFoundError(f"adapter '{word}': there is no {found.path}; {_EXPLAINED}")
    return found


def parse(word: str) -> AdapterWord:
    """The same of an adapter that need not be there. Raises UserError for what names none."""
    expert, sign, rest = word.partition("=")
    there = any(Path(name).exists() for name in (word, word.rpartition(":")[0] or word))
    if not sign or expert not in EXPERTS or there:
        expert, rest = "", word
    path, colon, number = rest.rpartition(":")
    if not colon or Path(rest).exists():
        path, number = rest, "1"
    try:
        strength = float(number)
    except ValueError:
        strength, path = 1.0, rest
    if not math.isfinite(strength):
        raise UserError(f"adapter '{word}': the strength must be finite; {_EXPLAINED}")
    if not path:
        raise NotFoundError(f"adapter '{word}': there is no path; {_EXPLAINED}")
    return AdapterWord(Path(path), strength, expert or None)


def read_adapters(
    words: Sequence[AdapterWord], base: Weights, *, what: str
) -> list[tuple[AdapterWord, AdapterFile]]:
    """Adapters by their words, each checked against the weights that it is added to.

    what: names these in messages. Raises UserError for the first that does not fit.
    """
    found = [(word, word.read()) for word in words]
    shapes = base.shapes() if found else {}
    for _, adapter in found:
        check_adapter(adapter, shapes, what=what)
    return found


class Merged:
    """Weights with all that adapters add to them, W + the sum of b a; read part by part.

    What nothing is added to stays as it is stored; the rest is fp32.
    """

    def __init__(
        self,
        weights: Weights,
        adapters: Sequence[AdapterFile],
        *,
        rounding: torch.dtype | None = None,
    ) -> None:
        """rounding: what the weights will be stored as; then `lost` is filled as they are read."""
        self.path = weights.path
        # Of each changed matrix that was read whole: ||rounded - exact|| / ||what was added||.
        self.lost: dict[str, float] = {}
        self._weights = weights
        self._rounding = rounding
        self._adapters = [(adapter, adapter.shapes().keys()) for adapter in adapters]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, without reading it."""
        return self._weights.shapes()

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Rows of one tensor along its first dimension."""
        stored = self._weights.read(name, rows)
        terms = [adapter.delta(name, rows) for adapter, names in self._adapters if name in names]
        if not terms:
            return stored
        added = torch.stack(terms).sum(dim=0) if terms[1:] else terms[0]
        exact = stored.float() + added
        if self._rounding not in (None, torch.float32) and rows == slice(None) and exact.ndim > 1:
            assert self._rounding is not None
            missed = exact.to(self._rounding).float() - exact
            norm = float(added.norm())
            self.lost[name] = float(missed.norm()) / norm if norm else 0.0
        return exact


class Rounded:
    """Weights as another dtype holds them, fp32."""

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        self.path = weights.path
        self._weights = weights
        self._dtype = dtype

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, without reading it."""
        return self._weights.shapes()

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Rows of one tensor along its first dimension."""
        return self._weights.read(name, rows).to(self._dtype).float()
