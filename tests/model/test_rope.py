"""Rotary positions and coordinate channels."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.wan.rope import axis_pairs, coordinate_channels, rotary_table, rotate, turn_pairs


def table(frames: int = 3, height: int = 2, width: int = 4, *, first: int = 0) -> Tensor:
    return rotary_table(torch.arange(first, first + frames), height, width, head_dim=16)


def random(tokens: int) -> Tensor:
    return torch.randn(2, tokens, 3, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("head_dim", "pairs"), [(128, (22, 21, 21)), (32, (6, 5, 5)), (16, (4, 2, 2))]
)
def test_axes_share_the_pairs_of_a_head_as_in_wan(
    head_dim: int, pairs: tuple[int, int, int]
) -> None:
    assert axis_pairs(head_dim) == pairs


def test_there_is_one_row_per_token() -> None:
    assert table().shape == (3 * 2 * 4, 1, 8, 2)


def test_the_first_token_is_not_turned() -> None:
    assert table()[0].tolist() == [[[1.0, 0.0]] * 8]


def test_each_axis_turns_its_own_pairs_by_its_own_position() -> None:
    token = table().view(3, 2, 4, 8, 2)[2, 1, 3]
    angles = [2.0, 2.0 / 10, 2.0 / 100, 2.0 / 1000, 1.0, 1.0 / 100, 3.0, 3.0 / 100]
    expected = [[math.cos(a), math.sin(a)] for a in angles]
    torch.testing.assert_close(token, torch.tensor(expected))


def test_later_frames_take_their_rows_from_the_whole_table() -> None:
    assert torch.equal(table(first=2, frames=1), table()[16:])


def test_turning_keeps_lengths() -> None:
    x = random(24)
    torch.testing.assert_close(rotate(x, table()).norm(dim=-1), x.norm(dim=-1))


def test_products_depend_on_relative_time_alone() -> None:
    q, k = random(24), random(24).flip(1)
    now = torch.einsum("bnhd,bmhd->bhnm", rotate(q, table()), rotate(k, table()))
    later = [rotate(v, table(first=50)) for v in (q, k)]
    torch.testing.assert_close(torch.einsum("bnhd,bmhd->bhnm", *later), now, atol=1e-5, rtol=0.0)


def test_turning_keeps_the_dtype() -> None:
    assert rotate(random(24).bfloat16(), table()).dtype == torch.bfloat16


def test_far_positions_are_as_exact_as_near_ones() -> None:
    angle = torch.tensor(12345.0, dtype=torch.float64)
    expected = torch.stack([angle.cos(), angle.sin()]).float()
    assert torch.equal(table(first=12345, frames=1)[0, 0, 0], expected)


def complex_turn(x: Tensor, table: Tensor) -> Tensor:
    """The rotation as it is written in complex numbers."""
    unit = torch.complex(table[..., 0].contiguous(), table[..., 1].contiguous())
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * unit).flatten(-2)


def real_turn(x: Tensor, table: Tensor) -> Tensor:
    """What a compiler reads."""
    return turn_pairs(x.unflatten(-1, (-1, 2)), table).flatten(-2)


@pytest.mark.parametrize("formula", [rotate, real_turn])
@pytest.mark.parametrize("head_dim", [16, 32, 128])
def test_turning_equals_the_complex_formula_bit_for_bit(
    formula: Callable[[Tensor, Tensor], Tensor], head_dim: int
) -> None:
    table = rotary_table(torch.arange(5, 9), 6, 8, head_dim)
    x = torch.randn(2, 4 * 6 * 8, 3, head_dim, generator=torch.Generator().manual_seed(1))
    weights, found = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)), []
    for turn in (formula, complex_turn):
        leaf = x.clone().requires_grad_()
        out = turn(leaf, table)
        found.append((out, *torch.autograd.grad((out * weights).sum(), leaf)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_table_holds_the_unit_numbers_of_its_angles_bit_for_bit() -> None:
    positions = torch.arange(100)
    angles = positions.double()  # of the first pair
    unit = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
    found = rotary_table(positions, 1, 1, head_dim=16)[:, 0, 0]
    assert torch.equal(found, torch.view_as_real(unit))


def test_coordinates_tell_the_first_frame_from_all_others() -> None:
    channels = coordinate_channels(torch.arange(3), 2, 4)
    assert channels.shape == (10, 3, 2, 4)
    assert channels[0, :, 0, 0].tolist() == [1.0, 0.0, 0.0]
    assert channels[1, :, 0, 0].tolist() == [0.0, 0.125, 0.25]


def test_coordinates_of_later_frames_are_those_of_the_whole() -> None:
    whole = coordinate_channels(torch.arange(4), 2, 4)
    assert torch.equal(coordinate_channels(torch.arange(2, 4), 2, 4), whole[:, 2:])


def test_no_two_places_have_the_same_coordinates() -> None:
    places = coordinate_channels(torch.arange(2), 6, 8).flatten(1).T
    distances = torch.cdist(places, places) + 10.0 * torch.eye(len(places))
    assert distances.min() > 0.05
