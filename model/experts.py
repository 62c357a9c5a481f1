"""Two networks that divide the noise levels, as one Denoiser (Wan2.2's A14B)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from model.flow import shift, unshift
from model.types import FULL_ATTENTION, Conditioning, Context, Denoiser, Prediction, Side
from utils.idle import Turns

SIDES: tuple[Side, Side] = ("high", "low")


def side_of(sigma: float, boundary: float) -> Side:
    """The expert of a noise level: the high one from the boundary on, which is its own.

    Compared in fp32, as levels of tensors are.
    """
    level, bound = torch.tensor([sigma, boundary]).tolist()
    return "high" if level >= bound else "low"


def side_of_all(sigma: Tensor, boundary: float) -> Side:
    """The expert of all samples of a batch at noise levels [B, 1] or [B, F]. Waits for the device.

    A sample with several levels is at its largest: those of given frames are 0. Raises ValueError
    unless all samples are on one side.
    """
    sides = {"high" if high else "low" for high in (sigma.amax(dim=1) >= boundary).tolist()}
    if len(sides) > 1:
        levels = ", ".join(f"{level:.4g}" for level in sigma.amax(dim=1).tolist())
        raise ValueError(
            f"noise levels {levels} lie on both sides of the experts' boundary {boundary:g}; "
            f"draw one expert per micro-batch"
        )
    return "high" if "high" in sides else "low"


def asking(side: Side | None) -> Context:
    """The context of a pass that one of two experts makes; None = one network makes it."""
    return FULL_ATTENTION if side is None else Context(side=side)


def scale_of(side: Side | None, cfg_scale: float, cfg_scale_low: float | None) -> float:
    """The guidance of an expert, cfg_scale being that of the high one; None = the same for both."""
    return cfg_scale_low if side == "low" and cfg_scale_low is not None else cfg_scale


@dataclass(frozen=True)
class Part:
    """The noise levels that one micro-batch is drawn from: one expert's, or all."""

    side: Side | None = None  # whose they are; None = one network has them all
    low: float = 0.0
    high: float = 1.0

    @property
    def context(self) -> Context:
        """Of passes at its levels."""
        return asking(self.side)

    def shifted(self, uniform: Tensor, factor: float) -> Tensor:
        """Uniform numbers in [0, 1) as shifted uniform noise levels of this part alone."""
        if self.side is None:
            return shift(uniform, factor)
        first, last = unshift(self.low, factor), unshift(self.high, factor)
        return self.within(shift(first + (last - first) * uniform, factor))

    def within(self, sigma: Tensor, least: float = 0.0, most: float = 1.0) -> Tensor:
        """Noise levels cut to [least, most] and to this part; the boundary is the high expert's."""
        if self.side == "low":
            most = min(most, float(torch.tensor(self.high).nextafter(torch.tensor(0.0))))
        return sigma.clamp(max(self.low, least), min(self.high, most))


WHOLE = Part()


@dataclass(frozen=True)
class Steps:
    """Those of a list of falling noise levels that one micro-batch is drawn from."""

    first: int
    count: int
    side: Side | None = None  # whose they are; None = one network has them all
    target: Side | None = None  # whose the levels are that they lead to

    def index(self, uniform: Tensor) -> Tensor:
        """Uniform numbers in [0, 1) as positions in the list."""
        return self.first + (uniform * self.count).long()


@dataclass(frozen=True)
class ExpertLevels:
    """The noise levels of losses where two experts divide them, or one of two is alone."""

    boundary: float
    sides: tuple[Side, ...] = SIDES  # the experts that there are

    def part(self, side: Side) -> Part:
        """Those of one expert."""
        if side == "high":
            return Part(side, low=self.boundary)
        return Part(side, high=self.boundary)

    def draw(self, rng: torch.Generator, factor: float) -> Part:
        """The part of a micro-batch: as often as shifted uniform levels fall into it.

        rng: shared by all ranks, since the side decides whose weights are gathered.
        """
        if len(self.sides) == 1:
            return self.part(self.sides[0])
        high = float(torch.rand((), generator=rng)) >= unshift(self.boundary, factor)
        return self.part("high" if high else "low")

    def draw_steps(
        self, rng: torch.Generator, levels: Sequence[float], targets: Sequence[float]
    ) -> Steps:
        """Those of a list of noise levels that one expert has, their targets' too being one's.

        As often as a step drawn from all that the experts have is among them.
        """
        sides = [
            (side_of(level, self.boundary), side_of(target, self.boundary))
            for level, target in zip(levels, targets, strict=True)
        ]
        own = [step for step, (side, _) in enumerate(sides) if side in self.sides]
        drawn = sides[own[int(torch.randint(len(own), (), generator=rng))]]
        alike = [step for step in own if sides[step] == drawn]
        return Steps(alike[0], len(alike), *drawn)


def draw_steps(
    experts: ExpertLevels | None,
    rng: torch.Generator,
    levels: Sequence[float],
    targets: Sequence[float] | None = None,
) -> Steps:
    """See ExpertLevels.draw_steps; None = one network, for which nothing is drawn.

    targets: the levels that these lead to; None = no network is asked there.
    """
    if experts is None:
        return Steps(0, len(levels))
    return experts.draw_steps(rng, levels, levels if targets is None else targets)


def draw_part(levels: ExpertLevels | None, rng: torch.Generator, factor: float) -> Part:
    """See ExpertLevels.draw; None = one network, for which nothing is drawn."""
    return WHOLE if levels is None else levels.draw(rng, factor)


def boundary_problems(key: str, boundary: float | None) -> Iterator[str]:
    """What is impossible about the noise level at which two experts meet; None = as it is."""
    if boundary is not None and not 0.0 < boundary < 1.0:
        yield f"{key}: must be a noise level between 0 and 1, or null, got {boundary}"


class ExpertPair(nn.Module):
    """One Denoiser of two: the expert of high noise levels, and that of low ones.

    A pass is one expert's alone. Which one it is, `Context.side` says; else `Context.level`; else
    the noise levels of the batch, which are read from their device then.
    """

    model: nn.ModuleDict  # the transformers, by side

    def __init__(self, high: nn.Module, low: nn.Module, boundary: float) -> None:
        """high, low: Denoisers whose weights are all in their `model`; boundary: a sigma."""
        super().__init__()
        if not 0.0 < boundary < 1.0:
            raise ValueError(f"the boundary of two experts must lie in (0, 1), got {boundary}")
        experts: dict[Side, nn.Module] = {"high": high, "low": low}
        self.model = nn.ModuleDict({side: _weights(expert) for side, expert in experts.items()})
        self.boundary = boundary
        self._experts = experts  # no module of its own: each weight has one name
        self._turns: Turns | None = None

    def take_turns(self, device: torch.device) -> None:
        """Keep the frozen weights of the expert that is not asked in host memory. In place."""
        self._turns = Turns(dict(self.model.items()), device)

    def expert(self, side: Side) -> Denoiser:
        """One of the two, with the pair's own weights."""
        found: Denoiser = self._experts[side]
        return found

    def side(self, sigma: Tensor, context: Context) -> Side:
        """Whose pass it is at noise levels [B, 1] or [B, F]."""
        if context.side is not None:
            return context.side
        if context.level is not None:
            return side_of(context.level, self.boundary)
        return side_of_all(sigma, self.boundary)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        context: Context = FULL_ATTENTION,
    ) -> Prediction:
        """x: [B, C, F, H, W] at noise level sigma [B, 1] or [B, F]; see model.types.Denoiser.

        Raises ValueError for batches on both sides, and for a past, which would be one expert's.
        """
        cache = context.cache
        if context.commit or (cache is not None and cache.frames):
            raise ValueError(
                "two experts make whole videos: keys of a past belong to one network, so a causal "
                "model of two experts would need every block remembered twice"
            )
        side = self.side(sigma, context)
        own = None if cache is None else cache.beside(side)
        if self._turns is not None:
            self._turns.bring(side)
        found = self.expert(side)(x, sigma, conditioning, context=replace(context, cache=own))
        if self._turns is not None and found.velocity.requires_grad:
            # Blocks that run again in the backward pass need their weights there once more.
            found.velocity.register_hook(partial(_bring_back, self._turns, side))
        return found


def _bring_back(turns: Turns, side: Side, gradient: Tensor) -> None:
    del gradient
    turns.bring(side)


def is_pair(weights: nn.Module) -> bool:
    """Whether the `model` of a network is that of two experts, under adapters or not."""
    return isinstance(weights, nn.ModuleDict) and set(weights) == set(SIDES)


def _weights(expert: nn.Module) -> nn.Module:
    """The module that holds all weights of a Denoiser."""
    model = expert.model
    assert isinstance(model, nn.Module), "a network keeps its weights in `model`"
    outside = len(list(expert.parameters())) - len(list(model.parameters()))
    assert not outside, f"{outside} weights of an expert are not in its `model`"
    return model
