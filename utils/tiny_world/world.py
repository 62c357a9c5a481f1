"""The embedded tiny world: captioned clips of a coloured shape that moves over a twinkling floor.

Clips are 17 frames of 32 x 32 RGB. A caption fixes colour, shape, direction, speed and
background; start, size and the floor's grey mosaic are free. The mosaic is drawn afresh for frame
0 and for each group of four frames; its cells are normal, and few Euler steps shrink a normal
variable in closed form, which is what makes this world hard for a teacher in few steps.
Letters: B clips, P pixel frames, G floors of a clip, S = 32 pixels a side. Lengths are in sides.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.errors import UserError

FRAMES, SIDE, CELLS, FPS = 17, 32, 8, 8
FLOOR_FRAMES = 4  # frames that share one floor, after frame 0, which has its own
FLOORS = 1 + (FRAMES - 1) // FLOOR_FRAMES
COLOURS = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.75, 0.20),
    "blue": (0.15, 0.25, 0.90),
    "yellow": (0.90, 0.85, 0.15),
    "purple": (0.65, 0.15, 0.85),
    "cyan": (0.15, 0.80, 0.85),
}
SHAPES = ("bar", "circle", "triangle")
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
TRAVEL = {"slowly": 0.16, "quickly": 0.44}  # sides, over the whole clip
FLOOR = {"dark": 0.22, "light": 0.72}  # mean grey
FLOOR_DEVIATION = 0.12  # the unit in which floor contrast is measured
FLOOR_SPREAD = 1.13  # of a cell before it is clamped at two deviations
HALF_SIZE = (0.17, 0.23)  # of the square that has the shape's area
MARGIN = 0.25  # centres keep this far from the borders
EDGE = 3.0 / SIDE  # width over which a shape's edge fades
ATTRIBUTES = ("colour", "shape", "direction", "speed", "background")
_VOCABULARIES = (tuple(COLOURS), SHAPES, tuple(DIRECTIONS), tuple(TRAVEL), tuple(FLOOR))


@dataclass(frozen=True)
class Caption:
    """The five attributes that a caption fixes."""

    colour: str
    shape: str
    direction: str
    speed: str
    background: str

    def __str__(self) -> str:
        return (
            f"a {self.colour} {self.shape} moving {self.direction} {self.speed} "
            f"on a {self.background} background"
        )

    @classmethod
    def parse(cls, text: str) -> Caption:
        """Read a caption back. Raises ValueError with a valid example if it is not one."""
        words = text.split()
        if len(words) == 10:
            caption = cls(words[1], words[2], words[4], words[5], words[8])
            if str(caption) == text.strip() and all(
                getattr(caption, name) in allowed
                for name, allowed in zip(ATTRIBUTES, _VOCABULARIES, strict=True)
            ):
                return caption
        raise UserError(f"not a caption of the tiny world: '{text}'; one is '{captions()[0]}'")

    @classmethod
    def of_indices(cls, indices: Sequence[int]) -> Caption:
        """The caption whose attributes lie at these positions in their vocabularies."""
        words = [names[i] for names, i in zip(_VOCABULARIES, indices, strict=True)]
        return cls(*words)

    def indices(self) -> tuple[int, ...]:
        """Each attribute as its position in its vocabulary."""
        return tuple(
            allowed.index(getattr(self, name))
            for name, allowed in zip(ATTRIBUTES, _VOCABULARIES, strict=True)
        )


def captions() -> list[Caption]:
    """All 288 captions, in a fixed order."""
    return [Caption(*words) for words in itertools.product(*_VOCABULARIES)]


def draw_captions(count: int, generator: torch.Generator) -> list[Caption]:
    """`count` captions: whole shuffled rounds of all 288, so that each appears equally often."""
    every = captions()
    drawn: list[Caption] = []
    while len(drawn) < count:
        order = torch.randperm(len(every), generator=generator).tolist()
        drawn += [every[i] for i in order]
    return drawn[:count]


@dataclass(frozen=True, eq=False)
class Scenes:
    """All that determines B clips."""

    captions: Sequence[Caption]
    start: Tensor  # [B, 2] centre at the first frame, (x, y)
    travel: Tensor  # [B, 2] way of the centre over the clip, (x, y)
    half_size: Tensor  # [B]
    floor: Tensor  # [B, G, CELLS, CELLS] grey values

    def shapes(self) -> Tensor:
        """[B] index of each clip's shape."""
        return torch.tensor([SHAPES.index(c.shape) for c in self.captions])

    def colours(self) -> Tensor:
        """[B, 3] RGB of each clip's shape."""
        return torch.tensor([COLOURS[c.colour] for c in self.captions])


def draw_scenes(chosen: Sequence[Caption], generator: torch.Generator) -> Scenes:
    """Draw what the captions leave free."""
    count = len(chosen)
    travel = torch.tensor(
        [[TRAVEL[c.speed] * axis for axis in DIRECTIONS[c.direction]] for c in chosen]
    )
    low = MARGIN + (-travel).clamp(min=0.0)
    high = 1.0 - MARGIN - travel.clamp(min=0.0)
    start = low + (high - low) * torch.rand(count, 2, generator=generator)
    smallest, largest = HALF_SIZE
    half_size = smallest + (largest - smallest) * torch.rand(count, generator=generator)
    deviation = torch.randn(count, FLOORS, CELLS, CELLS, generator=generator).clamp(-2.0, 2.0)
    base = torch.tensor([FLOOR[c.background] for c in chosen])
    floor = base[:, None, None, None] + FLOOR_DEVIATION * FLOOR_SPREAD * deviation
    return Scenes(chosen, start, travel, half_size, floor)


def render(scenes: Scenes) -> Tensor:
    """Clips [B, 3, P, S, S] in [0, 1]."""
    alpha = coverage(scenes.shapes(), scenes.start, scenes.travel, scenes.half_size)
    return compose(alpha, scenes.colours(), scenes.floor).clamp(0.0, 1.0)


def compose(alpha: Tensor, colours: Tensor, floor: Tensor) -> Tensor:
    """Shapes over floors: alpha [B, P, S, S], colours [B, 3], floor [B, G, CELLS, CELLS] grey."""
    cell = SIDE // CELLS
    grey = floor[:, floor_of_frame()].repeat_interleave(cell, 2).repeat_interleave(cell, 3)[:, None]
    over = alpha[:, None]
    return (1.0 - over) * grey + over * colours[:, :, None, None, None]


def floor_of_frame() -> Tensor:
    """[P] which of the G floors each frame shows."""
    return (torch.arange(FRAMES) + FLOOR_FRAMES - 1) // FLOOR_FRAMES


def coverage(shape: Tensor, start: Tensor, travel: Tensor, half_size: Tensor) -> Tensor:
    """How much of each pixel a moving shape covers, [B, P, S, S] in [0, 1].

    shape: [B] index into SHAPES; start, travel: [B, 2]; half_size: [B].
    """
    time = torch.linspace(0.0, 1.0, FRAMES)
    centre = start[:, None] + time[None, :, None] * travel[:, None]  # [B, P, 2]
    pixel = (torch.arange(SIDE) + 0.5) / SIDE
    x = pixel[None, None, None, :] - centre[..., 0, None, None]
    y = pixel[None, None, :, None] - centre[..., 1, None, None]
    s = half_size[:, None, None, None]
    distances = torch.stack([_bar(x, y, s), _circle(x, y, s), _triangle(x, y, s)])
    distance = distances[shape, torch.arange(len(shape))]
    return (0.5 - distance / EDGE).clamp(0.0, 1.0)


def _bar(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """Signed distance to a box of aspect 2.25 : 1 and area 4 s^2."""
    return torch.maximum(x.abs() - 1.5 * s, y.abs() - s / 1.5)


def _circle(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """Signed distance to a disc of area 4 s^2."""
    return (x.square() + y.square()).sqrt() - 2.0 / math.sqrt(math.pi) * s


def _triangle(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """Signed distance to an equilateral triangle of area 4 s^2, apex up, about its centroid."""
    inradius = 2.0 / 27.0**0.25 * s
    sides = x.abs() * math.cos(math.pi / 6.0) - y * math.sin(math.pi / 6.0)
    return torch.maximum(sides, y) - inradius
