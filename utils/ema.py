"""Exponential moving average of a module's weights, kept on each rank's own shards in fp32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class EMAConfig:
    """How the averaged weights follow the trained ones."""

    decay: float = 0.99  # per update of the role that is averaged
    start_step: int = 0  # before this outer step the average simply equals the weights


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; a plain tensor is its own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class EMA:
    """Shadow weights by name. Costs no communication: each rank averages what it holds."""

    def __init__(self, module: nn.Module, config: EMAConfig) -> None:
        self.config = config
        self.shadow: dict[str, Tensor] = {
            name: parameter.detach().float().clone() for name, parameter in named(module)
        }

    @torch.no_grad()
    def update(self, module: nn.Module, *, step: int) -> None:
        """Move the shadow toward the weights of `module` after its update at outer step `step`."""
        weight = 1.0 if step < self.config.start_step else 1.0 - self.config.decay
        shadows = [local(self.shadow[name]) for name, _ in named(module)]
        weights = [local(parameter.detach()).float() for _, parameter in named(module)]
        torch._foreach_lerp_(shadows, weights, weight)

    @contextlib.contextmanager
    def swapped_in(self, module: nn.Module) -> Iterator[None]:
        """Run the body with the averaged weights in `module`; the trained ones return after it."""
        trained = {name: local(parameter.detach()).clone() for name, parameter in named(module)}
        with torch.no_grad():
            for name, parameter in named(module):
                local(parameter).copy_(local(self.shadow[name]))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in named(module):
                    local(parameter).copy_(trained[name])


def named(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The module's parameters by name, in a fixed order."""
    return list(module.named_parameters())
