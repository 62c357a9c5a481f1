"""What a trainer is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from model.base import Method
from trainer.batches import BatchLoader
from trainer.health import HealthProbe
from trainer.logdir import Claim
from trainer.roles import Role
from trainer.run import Run
from trainer.validation import Validator
from utils.distributed import Session
from utils.metrics import Tracker


@dataclass(frozen=True, eq=False)
class TrainerParts:
    """What the composition root hands to a trainer."""

    run: Run
    session: Session
    method: Method
    roles: Mapping[str, Role]
    batches: BatchLoader
    trackers: Sequence[Tracker]
    validator: Validator | None
    logdir: Path
    save: bool  # whether checkpoints are written
    claim: Claim | None = None  # of the log directory; None = nothing is read or written there
    health: HealthProbe | None = None
