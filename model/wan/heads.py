"""Last layers for a path that is walked in few calls: one head for each step of a fine grid.

Grid position p in [0, 1] counts from noise to data; its noise level is shift(1 - p). Head i of n
says the velocity from position i / n to (i + 1) / n, whichever position the tokens come from. As
heads are affine, the mean velocity over any span is that of one head, their mean weighted by how
far each moves the noise level. So a network with n heads holds those of n / m calls in itself.
Letters as in model/types.py; n heads, S spans.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

BANK = "head.bank"  # where a transformer has them
WEIGHT, BIAS = f"{BANK}.weight", f"{BANK}.bias"
PLAIN_WEIGHT, PLAIN_BIAS = "head.head.weight", "head.head.bias"  # the one head of other networks


@dataclass(frozen=True, eq=False)
class Spans:
    """The parts of the path whose mean velocities a pass is asked for."""

    positions: Tensor  # [B, S, 2], fp64: where they begin and end; the first is what the pass says
    shift: float  # of the grid's noise levels
    said: list[Tensor] = field(default_factory=list)  # of the others, [B, C, F, H, W], no gradient


def levels_at(positions: Tensor, shift: float) -> Tensor:
    """Noise levels of grid positions, in fp64."""
    sigma = 1.0 - positions.double()
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def shares(spans: Tensor, heads: int, shift: float) -> Tensor:
    """How much each of `heads` has in spans [..., 2]: [..., n], fp64, of sum 1; of empty ones 0."""
    edges = torch.arange(heads + 1, dtype=torch.float64, device=spans.device) / heads
    begin, end = spans[..., :1], spans[..., 1:]
    low = edges[:-1].maximum(begin)
    high = edges[1:].minimum(end).maximum(low)
    moved = levels_at(low, shift) - levels_at(high, shift)
    whole = levels_at(begin, shift) - levels_at(end, shift)
    return torch.where(whole > 0.0, moved / whole.clamp(min=1e-300), torch.zeros_like(moved))


def mixed(values: Tensor, rows: Tensor) -> Tensor:
    """sum_i rows_i values_i: values [n, ...], rows [R, n] fp64. Returns [R, ...], fp32.

    Summed in fp64, each row by itself, so that a row has the same bits beside any others: what is
    fused once and for all is what every pass before has used. A row of one head is that head.
    """
    flat = values.double().flatten(1)
    if torch.is_grad_enabled() and values.requires_grad:
        mean = rows @ flat  # one product, for one gradient of all heads
    else:
        mean = torch.cat([row[None] @ flat for row in rows])
    return mean.float().view(-1, *values.shape[1:])


class HeadBank(nn.Module):
    """The heads of a grid, fp32 whatever the other weights are, and so is what they compute."""

    exact: ClassVar[bool] = True  # see utils.parallel.shard

    def __init__(self, heads: int, dim: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, out, dim, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(heads, out, dtype=torch.float32))

    def forward(self, x: Tensor, spans: Spans) -> Tensor:
        """x: [B, N, D], fp32. Returns [B, N, S * out]: the mean over each span, one beside another.

        Only the first span's has a gradient.
        """
        rows = shares(spans.positions, len(self.weight), spans.shift)
        first = self.said(x, rows[:, 0])
        with torch.no_grad():
            others = [self.said(x, row) for row in rows.unbind(1)[1:]]
        return torch.cat([first, *others], dim=-1)

    def said(self, x: Tensor, rows: Tensor) -> Tensor:
        """What the mean heads of rows [B, n] say: [B, N, out]."""
        weight, bias = mixed(self.weight, rows), mixed(self.bias, rows)
        return torch.baddbmm(bias[:, None], x, weight.mT)


def declare_heads(model: nn.Module, heads: int, *, plain: bool) -> None:
    """Give a transformer so many heads without values, beside its own or in its place. In place.

    plain: whether it keeps its own, for those who ask for no spans.
    """
    head = model.get_submodule("head")
    own = head.get_submodule("head")
    assert isinstance(own, nn.Linear), "a transformer ends with a linear layer"
    with own.weight.device:
        head.add_module("bank", HeadBank(heads, own.in_features, own.out_features))
    if not plain:
        head.add_module("head", None)


def bank_of(model: nn.Module) -> HeadBank | None:
    """The heads of a transformer; None = it has one of its own alone."""
    found = dict(model.get_submodule("head").named_children()).get("bank")
    return found if isinstance(found, HeadBank) else None


def has_plain(model: nn.Module) -> bool:
    """Whether a transformer has a head of its own, for those who ask for no spans."""
    return "head" in dict(model.get_submodule("head").named_children())


def count_heads(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many heads the weights of these shapes have; 0 = one ordinary one."""
    return shapes[WEIGHT][0] if WEIGHT in shapes else 0
