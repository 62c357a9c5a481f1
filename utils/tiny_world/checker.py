"""The tiny world's judge: reads attributes off a clip in closed form, with no learned part.

A clip follows its caption if all five attributes read off it are the caption's; it is valid if
re-rendering what was read gives the clip back (PSNR) and its floor has a real floor's contrast.
Letters as in utils/tiny_world/world.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.tiny_world.world import (
    ATTRIBUTES,
    CELLS,
    COLOURS,
    DIRECTIONS,
    FLOOR,
    FLOOR_DEVIATION,
    FLOORS,
    FRAMES,
    SHAPES,
    SIDE,
    TRAVEL,
    Caption,
    compose,
    coverage,
    floor_of_frame,
)

MIN_PSNR_DB = 20.0  # real clips through the codec lie above 25
CONTRAST_RANGE = (0.85, 1.25)  # real clips lie in 0.91 to 1.20
MIN_SEEN = 4.0  # uncovered pixels over all frames that a floor cell needs to be read
MIN_AREA = 0.02  # of the frame; a shape smaller than this on average is absent


@dataclass(frozen=True, eq=False)
class Reading:
    """What the checker reads off B clips."""

    attributes: Tensor  # [B, 5] index into each vocabulary, in the order of ATTRIBUTES
    start: Tensor  # [B, 2]
    travel: Tensor  # [B, 2]
    half_size: Tensor  # [B]
    contrast: Tensor  # [B] floor deviation in units of a real floor's
    psnr: Tensor  # [B] dB, of the clip against its re-rendering
    present: Tensor  # [B] bool, whether there is a shape at all

    def valid(self) -> Tensor:
        """[B] bool: the clip is one that this world can contain."""
        low, high = CONTRAST_RANGE
        contrast = (self.contrast >= low) & (self.contrast <= high)
        return self.present & (self.psnr >= MIN_PSNR_DB) & contrast

    def matches(self, wanted: Sequence[Caption]) -> Tensor:
        """[B, 5] bool: which attributes are those of the captions."""
        target = torch.tensor([caption.indices() for caption in wanted])
        return (self.attributes == target) & self.present[:, None]

    def faults(self, wanted: Sequence[Caption]) -> list[list[str]]:
        """Per clip why it does not follow its caption or is not valid, in words; none = it does."""
        return [self._faults(i, caption) for i, caption in enumerate(wanted)]

    def _faults(self, index: int, wanted: Caption) -> list[str]:
        if not self.present[index]:
            return ["no shape is to be seen"]
        read = Caption.of_indices(self.attributes[index].tolist())
        found = [
            f"{name}: {getattr(read, name)} instead of {getattr(wanted, name)}"
            for name in ATTRIBUTES
            if getattr(read, name) != getattr(wanted, name)
        ]
        contrast, psnr = float(self.contrast[index]), float(self.psnr[index])
        low, high = CONTRAST_RANGE
        if not low <= contrast <= high:
            found.append(
                f"the floor has {contrast:.0%} of a real floor's contrast, "
                f"{'below' if contrast < low else 'above'} the limit of "
                f"{low if contrast < low else high:.0%}"
            )
        if psnr < MIN_PSNR_DB:
            found.append(
                f"blurred or noisy: {psnr:.1f} dB from its clean rendering, {MIN_PSNR_DB:.0f} dB "
                f"are asked for"
            )
        return found

    def orthogonal_start(self) -> Tensor:
        """[B] the start coordinate across the direction of motion, free in every caption."""
        horizontal = self.attributes[:, ATTRIBUTES.index("direction")] < 2
        return torch.where(horizontal, self.start[:, 1], self.start[:, 0])

    def features(self) -> Tensor:
        """[B, 5] continuous readings, for a Frechet distance."""
        travel = self.travel.norm(dim=1)
        columns = (*self.start.unbind(1), self.half_size, travel, self.contrast)
        return torch.stack(columns, dim=1)


def read_attributes(pixels: Tensor) -> Reading:
    """Read B clips [B, 3, P, S, S] in [0, 1]."""
    if pixels.shape[1:] != (3, FRAMES, SIDE, SIDE):
        raise ValueError(
            f"clips must be [B, 3, {FRAMES}, {SIDE}, {SIDE}], got {tuple(pixels.shape)}"
        )
    pixels = pixels.float().clamp(0.0, 1.0)
    colour, alpha = _segment(pixels)
    start, travel, half_size, present = _track(alpha)
    shape, template = _fit_shape(alpha, start, travel, half_size)
    rgb = torch.tensor(list(COLOURS.values()))[colour]
    floor, seen = _fit_floor(pixels, template, rgb)
    error = (compose(template, rgb, floor) - pixels).square().mean(dim=(1, 2, 3, 4))
    cells = seen.sum(dim=(1, 2, 3)).clamp(min=1)
    base = (floor * seen).sum(dim=(1, 2, 3)) / cells
    deviation = (floor - base[:, None, None, None]) * seen
    direction = _nearest_direction(travel)
    fast = travel.abs().amax(dim=1) >= (TRAVEL["slowly"] * TRAVEL["quickly"]) ** 0.5
    light = base >= sum(FLOOR.values()) / 2
    return Reading(
        attributes=torch.stack([colour, shape, direction, fast.long(), light.long()], dim=1),
        start=start,
        travel=travel,
        half_size=half_size,
        contrast=(deviation.square().sum(dim=(1, 2, 3)) / cells).sqrt() / FLOOR_DEVIATION,
        psnr=-10.0 * error.clamp(min=1e-10).log10(),
        present=present,
    )


def _segment(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The palette colour that explains a clip's chroma best, [B], and its coverage [B, P, S, S].

    Floors are grey, so a pixel's chroma is its coverage times the colour's chroma.
    """
    chroma = pixels - pixels.mean(dim=1, keepdim=True)
    palette = torch.tensor(list(COLOURS.values()))
    palette = palette - palette.mean(dim=1, keepdim=True)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for index, colour in enumerate(palette):
        along = torch.einsum("bcpyx,c->bpyx", chroma, colour) / colour.square().sum()
        alpha = along.clamp(0.0, 1.0)
        rest = chroma - alpha[:, None] * colour[None, :, None, None, None]
        error = rest.square().mean(dim=(1, 2, 3, 4))
        if best is None:
            best = (torch.zeros(len(error), dtype=torch.long), alpha, error)
            continue
        better = error < best[2]
        best = (
            torch.where(better, index, best[0]),
            torch.where(better[:, None, None, None], alpha, best[1]),
            torch.minimum(error, best[2]),
        )
    assert best is not None
    return best[0], best[1]


def _track(alpha: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Straight path and size of a coverage: start [B, 2], travel [B, 2], half size, presence."""
    weight = ((alpha - 0.25) / 0.5).clamp(0.0, 1.0)  # symmetric about 1/2, so areas survive
    mass = weight.sum(dim=(2, 3))
    pixel = (torch.arange(SIDE) + 0.5) / SIDE
    x = (weight.sum(dim=2) * pixel).sum(dim=2) / mass.clamp(min=1e-6)
    y = (weight.sum(dim=3) * pixel).sum(dim=2) / mass.clamp(min=1e-6)
    centre = torch.stack([x, y], dim=2)  # [B, P, 2]
    time = torch.linspace(-0.5, 0.5, FRAMES)
    travel = torch.einsum("bpc,p->bc", centre, time) / time.square().sum()
    start = centre.mean(dim=1) - 0.5 * travel
    area = mass.mean(dim=1) / SIDE**2
    return start, travel, (area / 4.0).sqrt(), area >= MIN_AREA


def _fit_shape(
    alpha: Tensor, start: Tensor, travel: Tensor, half_size: Tensor
) -> tuple[Tensor, Tensor]:
    """The shape [B] whose coverage on the fitted path is nearest, and that coverage."""
    templates = torch.stack(
        [
            coverage(torch.full((len(alpha),), i), start, travel, half_size)
            for i in range(len(SHAPES))
        ]
    )
    errors = (templates - alpha).square().mean(dim=(2, 3, 4))
    shape = errors.argmin(dim=0)
    return shape, templates[shape, torch.arange(len(shape))]


def _fit_floor(pixels: Tensor, alpha: Tensor, rgb: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares grey of each floor cell, given what covers it, and which cells were seen.

    Both [B, G, CELLS, CELLS]; a cell that the shape hides gets its clip's mean grey.
    """
    cell = SIDE // CELLS
    through = 1.0 - alpha
    behind = (pixels - alpha[:, None] * rgb[:, :, None, None, None]).mean(dim=1)

    def per_cell(values: Tensor) -> Tensor:
        cells = values.unflatten(3, (CELLS, cell)).unflatten(2, (CELLS, cell)).sum((3, 5))
        floors = torch.zeros(len(cells), FLOORS, CELLS, CELLS)
        return floors.index_add_(1, floor_of_frame(), cells)

    weight = per_cell(through.square())
    floor = per_cell(through * behind) / weight.clamp(min=1e-6)
    seen = weight >= MIN_SEEN
    mean = (floor * seen).sum(dim=(1, 2, 3)) / seen.sum(dim=(1, 2, 3)).clamp(min=1)
    return torch.where(seen, floor, mean[:, None, None, None]), seen


def _nearest_direction(travel: Tensor) -> Tensor:
    """[B] index of the direction that each way points along most."""
    directions = torch.tensor(list(DIRECTIONS.values()))
    return (travel @ directions.T).argmax(dim=1)
