"""Implicit distribution alignment: the critic is pulled after the generator (arXiv:2506.00523)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from model.base import MethodConfig, Needs
from model.matching import Option


@dataclass(frozen=True)
class IDAConfig(MethodConfig):
    """How far it is pulled."""

    critic_pull: float = 0.0  # IDA: share by which the critic jumps to the generator's new weights

    def problems(self) -> Iterator[str]:
        """See MethodConfig."""
        yield from super().problems()
        if not 0.0 <= self.critic_pull < 1.0:
            yield f"loss.critic_pull: must lie in [0, 1), got {self.critic_pull}"


class IDA(Option):
    """critic <- critic + critic_pull (generator - critic) when the generator has moved."""

    config: IDAConfig

    @classmethod
    def asked(cls, config: IDAConfig) -> bool:
        """See Option."""
        return config.critic_pull > 0.0

    @classmethod
    def needs(cls, config: IDAConfig, needs: Needs) -> Needs:
        """A critic of the generator's sizes."""
        del config
        return replace(needs, same_architecture=("generator", "critic"))

    @torch.no_grad()
    def after_update(self, role: str) -> None:
        """See the class."""
        group, dot, side = role.partition(".")  # of two experts the one that moved
        if group != "generator":
            return
        own = self.parts.parameters
        for parameter, other in zip(own[f"critic{dot}{side}"], own[role], strict=True):
            parameter.lerp_(other, self.config.critic_pull)
