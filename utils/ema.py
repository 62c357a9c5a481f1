"""Exponential moving average of weights, kept on each rank's own shards in fp32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
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

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: EMAConfig) -> None:
        self.config = config
        self.parameters = parameters
        self.shadow: dict[str, Tensor] = {
            name: parameter.detach().float().clone() for name, parameter in parameters.items()
        }

    @torch.no_grad()
    def update(self, *, step: int, prefix: str = "") -> None:
        """Move the shadow toward the weights after their update at outer step `step`.

        prefix: of the names of those that were updated.
        """
        weight = 1.0 if step < self.config.start_step else 1.0 - self.config.decay
        names = [name for name in self.parameters if name.startswith(prefix)]
        shadows = [local(self.shadow[name]) for name in names]
        weights = [local(self.parameters[name].detach()).float() for name in names]
        torch._foreach_lerp_(shadows, weights, weight)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Run the body with the averaged weights in place; the trained ones return after it."""
        trained = {name: local(p.detach()).clone() for name, p in self.parameters.items()}
        self._put(self.shadow)
        try:
            yield
        finally:
            self._put(trained)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            local(parameter).copy_(local(values[name]))
