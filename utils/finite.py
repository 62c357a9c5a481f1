"""Whether numbers are finite: of a step before it moves anything, of a state before it is saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from utils.ema import local


def all_finite(scalars: Iterable[Tensor], device: torch.device) -> bool:
    """Whether none of some scalars is NaN or infinite. Waits for the device."""
    together = torch.stack([scalar.detach().to(device) for scalar in scalars])
    return bool(torch.isfinite(together).all())


def marked(loss: Tensor) -> Tensor:
    """The gradient that a backward pass of `loss` begins with: 1, and NaN if it is not finite.

    So a loss that is not finite on one rank makes the gradients of all ranks NaN, by the sums that
    ranks make of them anyway; nothing is asked, and nobody waits.
    """
    loss = loss.detach()
    return torch.ones_like(loss).where(torch.isfinite(loss), torch.nan)


def not_finite_in(state: Mapping[str, Any]) -> list[str]:
    """The names of nested tensors, of which this rank holds NaN or infinite numbers.

    Waits for each device that they lie on once.
    """
    flags: dict[torch.device, tuple[list[str], list[Tensor]]] = {}
    for name, tensor in _tensors("", state):
        part = local(tensor.detach())
        if part.is_floating_point() and part.numel():
            names, bad = flags.setdefault(part.device, ([], []))
            names.append(name)
            # Both ends of the values: no copy of the tensor is made, as isfinite alone would.
            bad.append(~torch.isfinite(torch.stack(part.aminmax())).all())
    found = []
    for names, bad in flags.values():
        told = torch.stack(bad).tolist()
        found += [name for name, is_bad in zip(names, told, strict=True) if is_bad]
    return found


def _tensors(prefix: str, state: Mapping[str, Any]) -> Iterable[tuple[str, Tensor]]:
    for key, value in state.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from _tensors(f"{prefix}{key}.", value)
