"""The trainers that a configuration may name, and the methods that each of them trains."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, cast

import model
from model.base import Method
from utils.registry import member_of


@dataclass(frozen=True)
class TrainerEntry:
    """Where a trainer's class is, and the method that it trains unless told otherwise."""

    module: str  # imported when it is used: trainers import the configuration, which names them
    name: str
    usual: str  # a file in model/

    def load(self) -> Any:
        """The class."""
        return getattr(importlib.import_module(self.module), self.name)


TRAINERS = {
    "score_distillation": TrainerEntry("trainer.distillation", "ScoreDistillationTrainer", "dmd"),
    "diffusion": TrainerEntry("trainer.diffusion", "DiffusionTrainer", "diffusion"),
    "gan": TrainerEntry("trainer.gan", "GANTrainer", "gan"),
    "ode": TrainerEntry("trainer.ode", "ODETrainer", "ode"),
}


def find_method(trainer: str, distribution_loss: str | None) -> type[Method]:
    """The method that two selectors name. Raises ValueError with the choices."""
    name = distribution_loss or TRAINERS[trainer].usual
    found = member_of(
        model, name, Method, key="distribution_loss", fits=lambda cls: cls.trainer == trainer
    )
    return cast(type[Method], found)
