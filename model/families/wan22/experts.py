"""Wan2.2's A14B: two experts, each for its noise levels, behind Wan2.1's autoencoder."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

import model.families.wan21.export as exports
import model.families.wan22.weights as pairs
from model.encoders.vae import VideoVAE
from model.experts import SIDES, ExpertPair
from model.families.base import Advice, Experts, Export, Model
from model.families.wan21.folder import CONFIG, MODEL_INDEX, ModelFolder, holds_experts, published
from model.families.wan21.release import Wan21, may_be_wans
from model.families.wan21.weights import one_side
from model.folders.component import read_json
from model.folders.loading import Placement
from model.types import LatentSpec, Side
from model.wan.config import WanConfig
from utils.errors import UserError
from utils.seeding import derive_seed
from utils.weights import Weights

BOUNDARY = "_boundary"  # in our experts' config.json, where the release has none
_ADVICE = {
    "t2v": Advice(shift=12.0, steps=40, cfg_scale=4.0, cfg_scale_low=3.0, boundary=0.875),
    "i2v": Advice(shift=5.0, steps=40, cfg_scale=3.5, cfg_scale_low=3.5, boundary=0.9),
}


class Wan22Experts(Wan21):
    """A folder of two transformers of one size; `folder` speaks of the high-noise one."""

    family = "Wan2.2 A14B"
    network = "pair of Wan transformers"
    marks = tuple(f"{side}.{name}" for side in SIDES for name in Wan21.marks)

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.folder = self.side("high")

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """By a folder of one of its experts, by its index, or by its name."""
        there = path.is_dir() and (holds_experts(path) or published(path, "A14B"))
        return there and may_be_wans(path)

    def side(self, side: Side) -> ModelFolder:
        """What lies where for one expert."""
        return replace(self.folder, side=side)

    @cached_property
    def sizes(self) -> WanConfig:
        """Of each transformer. Raises UserError unless both are alike."""
        known = [side for side in map(self.side, SIDES) if side.config is not None]
        sizes = [side.wan_config() for side in known]
        if len(set(sizes)) > 1:
            raise UserError(
                f"{self.path}: its two experts are of different sizes ({known[0].config} and "
                f"{known[1].config}); they must be alike"
            )
        return sizes[0] if sizes else self.folder.wan_config()

    @property
    def experts(self) -> Experts | None:
        """See Model; as its index or our config.json says, else as published."""
        index = self.path / MODEL_INDEX
        stated = {index: read_json(index).get("boundary_ratio")}
        if self.folder.config is not None:
            stated[self.folder.config] = read_json(self.folder.config).get(BOUNDARY)
        for path, boundary in stated.items():
            if boundary is not None:
                _check_boundary(boundary, f"{path}: boundary")
                return Experts(float(boundary))
        assert self.advice is not None
        assert self.advice.boundary is not None
        return Experts(self.advice.boundary)

    @property
    def advice(self) -> Advice | None:
        """See Model. 480p image clips were published with shift 3."""
        return _ADVICE["i2v" if self.sizes.given_latents else "t2v"]

    @property
    def architecture(self) -> Hashable:
        """See Model."""
        return "experts", self.sizes

    def only(self, side: Side) -> Model:
        """See Model."""
        if side not in SIDES:
            raise UserError(f"{self.path}: no expert '{side}'; its experts are high and low")
        return OneExpert(self, side)

    def missing(
        self, *, weights: bool = True, encoders: bool = True, text: bool = True
    ) -> list[str]:
        """See Model; what is of one expert alone is named so."""
        found = []
        for side in SIDES:
            folder = self.side(side)
            lacking = folder.missing(weights=weights, encoders=False)
            found += [f"of the {side}-noise expert {what}" for what in lacking]
        both = self.side("high" if self.folder.config is not None else "low")
        shared = both.missing(weights=False, encoders=encoders, text=text)
        return found + [what for what in shared if CONFIG not in what]

    @classmethod
    def own_names(cls, weights: Weights, role: str) -> Weights:
        """Under the official release's names, behind their sides if they have any."""
        if pairs.holds_sides(weights):
            return pairs.translated(weights, role)
        return super().own_names(weights, role)

    @classmethod
    def renamed(cls, name: str, naming: str) -> str:
        """See Wan21; sides stay in front."""
        side, dot, own = name.partition(".")
        return f"{side}{dot}{super().renamed(own, naming)}"

    def find_weights(
        self, path: Path | None = None, *, role: str = "generator", averaged: bool | None = False
    ) -> Weights:
        """See Model; both experts', under the official release's names behind their sides."""
        return pairs.find_pair(path or self.path, role=role, averaged=averaged)

    def check_weights(self, weights: Weights, *, what: str) -> None:
        """See Model."""
        for side in SIDES:
            self.only(side).check_weights(one_side(weights, side), what=f"{what}, {side}")

    def load_network(self, weights: Weights, place: Placement, *, what: str) -> nn.Module:
        """See Model; an ExpertPair."""
        high, low = (
            self.only(side).load_network(
                one_side(weights, side), place.side(side), what=f"{what}, {side}"
            )
            for side in SIDES
        )
        return self._pair(high, low)

    def random_network(self, seed: int, place: Placement) -> nn.Module:
        """See Model; the two are different."""
        high, low = (
            self.only(side).random_network(derive_seed(seed, side), place.side(side))
            for side in SIDES
        )
        return self._pair(high, low)

    def _pair(self, high: nn.Module, low: nn.Module) -> ExpertPair:
        assert self.experts is not None
        return ExpertPair(high, low, self.experts.boundary)

    def _release(self, export: Export) -> exports.Release:
        boundary, advice = export.boundary, self.advice
        if boundary is None:
            assert self.experts is not None
            boundary = self.experts.boundary
        assert advice is not None
        _check_boundary(boundary, "boundary")
        index = {
            "transformer_2": ["diffusers", "WanTransformer3DModel"],
            "boundary_ratio": boundary,
        }
        return exports.Release(
            sides=SIDES,
            shift=advice.shift if export.shift is None else export.shift,
            index=index,
            private={} if boundary == advice.boundary else {BOUNDARY: boundary},
        )


class OneExpert(Wan21):
    """One expert of a folder of two, as a model of one network; no family of its own."""

    family = "Wan2.2 A14B, one expert"

    def __init__(self, pair: Wan22Experts, side: Side) -> None:
        super().__init__(pair.path)
        self.folder, self._pair = pair.side(side), pair

    @cached_property
    def sizes(self) -> WanConfig:
        """The transformer's."""
        return self._pair.sizes

    @property
    def latent(self) -> LatentSpec:
        """See Model."""
        return self._pair.latent

    @property
    def advice(self) -> Advice | None:
        """See Model; of both experts."""
        return self._pair.advice

    def load_codec(self, device: torch.device, dtype: torch.dtype) -> VideoVAE:
        """See Model."""
        return self._pair.load_codec(device, dtype)

    def _release(self, export: Export) -> exports.Release:
        index = {"transformer_2": exports.NO_PART, "boundary_ratio": None}
        return replace(super()._release(export), index=index)


def _check_boundary(boundary: object, what: str) -> None:
    if type(boundary) not in (int, float) or not 0.0 < float(str(boundary)) < 1.0:
        raise UserError(
            f"{what} must be a noise level between 0 and 1, above which the high expert serves, "
            f"got {boundary!r}"
        )
