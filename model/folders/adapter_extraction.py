"""Adapters out of two whole models: the best factors of some rank, by SVD, and what they miss.

Letters: r rank, d [out, in] what a student's matrix has more than its base's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from model.folders.adapter_files import AdapterFile, LowRank, side_and_layer
from model.wan.adapter_names import holds, is_layer
from utils.errors import UserError
from utils.seeding import generator
from utils.weights import Weights, WeightsError

EXACT_UP_TO = 1024  # rows or columns; larger matrices are decomposed at random, see `_sketched`
OVERSAMPLING, POWER_STEPS = 16, 4  # within .1 % of the best error where that was measured
FIRST_RANK = 32  # tried first where an error is asked for


@dataclass(frozen=True)
class Wanted:
    """How good an extracted adapter is to be: of this rank, or within this error per layer."""

    rank: int | None = 64
    max_error: float | None = None

    def check(self) -> None:
        """Raise UserError unless it says one of the two."""
        if (self.rank is None) == (self.max_error is None):
            raise UserError("an adapter is extracted by its rank or by its error; give one")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"rank: must be at least 1, got {self.rank}")
        if self.max_error is not None and not 0.0 < self.max_error < 1.0:
            raise UserError(f"max_error: must lie within (0, 1), got {self.max_error}")


@dataclass(frozen=True)
class LayerLoss:
    """One layer's change, and what its factors miss of it."""

    rank: int
    change: float  # ||d||, Frobenius
    error: float  # ||d - b a|| / ||d||


@dataclass(frozen=True, eq=False)
class Extraction:
    """An adapter and how far it is from what it was extracted from."""

    adapter: AdapterFile
    layers: Mapping[str, LayerLoss]
    beside: float  # norm of the change that lies in weights which no adapter of this kind holds

    @property
    def error(self) -> float:
        """The error over all layers together."""
        missed = math.sqrt(sum((x.error * x.change) ** 2 for x in self.layers.values()))
        return missed / self._change if self._change else 0.0

    @property
    def share_beside(self) -> float:
        """`beside`, of the norm of the whole change."""
        whole = math.hypot(self._change, self.beside)
        return self.beside / whole if whole else 0.0

    @property
    def _change(self) -> float:
        return math.sqrt(sum(x.change**2 for x in self.layers.values()))

    def report(self) -> dict[str, Any]:
        """All figures, fit for JSON."""
        layers = {n: {"rank": x.rank, "error": x.error} for n, x in self.layers.items()}
        return {"error": self.error, "share_beside": self.share_beside, "layers": layers}


@torch.no_grad()
def extract(
    student: Weights,
    base: Weights,
    wanted: Wanted,
    *,
    device: torch.device,
    layout: str = "diffusers",
) -> Extraction:
    """What `student` has more than `base`, as factors; both under official names, read in turn.

    layout: of the file to be; layers that it cannot hold count as `beside`. Raises UserError.
    """
    wanted.check()
    check_twins(student, base)
    factors: dict[str, LowRank] = {}
    layers: dict[str, LayerLoss] = {}
    beside = 0.0
    for name in tqdm(base.shapes(), desc="extracting", unit="tensor"):
        d = student.read(name).to(device).float() - base.read(name).to(device).float()
        layer = name.removesuffix(".weight")
        plain = side_and_layer(layer)[1]
        if not name.endswith(".weight") or not is_layer(plain) or not holds(layout, plain):
            beside += float(d.double().square().sum())
            continue
        change = float(d.norm())
        if not change and not plain.startswith("blocks."):
            continue  # in blocks it stays as zeros: kohya's readers want all of them
        u, s, v = _decomposed(d, wanted, name)
        pair = LowRank(s.sqrt()[:, None] * v.T, u * s.sqrt())
        missed = float((d - pair.delta()).norm())
        factors[layer] = LowRank(pair.a.cpu().contiguous(), pair.b.cpu().contiguous())
        layers[layer] = LayerLoss(len(s), change, missed / change if change else 0.0)
    if not any(x.change for x in layers.values()):
        raise WeightsError(f"{student.path} and {base.path}: no matrix differs; nothing to extract")
    return Extraction(AdapterFile(factors, path=student.path), layers, math.sqrt(beside))


def check_twins(student: Weights, base: Weights) -> None:
    """Raise WeightsError unless both have the same weights of the same shapes."""
    ours, theirs = student.shapes(), base.shapes()
    other = sorted(
        name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)
    )
    if other:
        raise WeightsError(
            f"{student.path} is no student of {base.path}: {len(other)} weights differ in name or "
            f"shape: {_few(other)}; give the base that it was trained from"
        )


def _few(names: Iterable[str]) -> str:
    return ", ".join(list(names)[:3])


def _decomposed(d: Tensor, wanted: Wanted, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """u [out, r], s [r] and v [in, r] with d about u diag(s) v^T, of the rank that is wanted."""
    least = min(d.shape)
    if not d.any():
        return d.new_zeros(len(d), 1), d.new_zeros(1), d.new_zeros(d.shape[1], 1)
    if least <= EXACT_UP_TO:
        return _cut(_exact(d), d, wanted)
    rank = wanted.rank or FIRST_RANK
    while True:
        if 2 * (rank + OVERSAMPLING) > least:  # a sketch would cost as much
            return _cut(_exact(d), d, wanted)
        u, s, v = _cut(_sketched(d, rank, name), d, wanted)
        if wanted.max_error is None or len(s) <= rank:
            return u, s, v
        rank *= 2


def _exact(d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(
        d.double() if min(d.shape) <= EXACT_UP_TO else d, full_matrices=False
    )
    return u.float(), s.float(), vh.T.float()


def _sketched(d: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular triples by random projection (arXiv:0909.4061, algorithms 4.4 and 5.1)."""
    draws = generator(0, "sketch", name)
    q = torch.randn(d.shape[1], rank + OVERSAMPLING, generator=draws).to(d.device)
    q = torch.linalg.qr(d @ q).Q
    for _ in range(POWER_STEPS):
        q = torch.linalg.qr(d @ torch.linalg.qr(d.T @ q).Q).Q
    u, s, vh = torch.linalg.svd(q.T @ d, full_matrices=False)
    return q @ u, s, vh.T


def _cut(
    triples: tuple[Tensor, Tensor, Tensor], d: Tensor, wanted: Wanted
) -> tuple[Tensor, Tensor, Tensor]:
    """As many triples as are wanted; one more than a sketch is good for if these are too few."""
    u, s, v = triples
    if wanted.rank is not None:
        rank = wanted.rank
    else:
        assert wanted.max_error is not None, "checked at the beginning"
        held = s.double().square().cumsum(0)
        enough = d.double().square().sum() * (1.0 - wanted.max_error**2)
        rank = int((held < enough).sum()) + 1
    return u[:, :rank], s[:rank], v[:, :rank]
