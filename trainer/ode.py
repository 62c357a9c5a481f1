"""ODETrainer: one network that learns to jump along a teacher's trajectories, every step."""

from __future__ import annotations

from trainer.diffusion import DiffusionTrainer


class ODETrainer(DiffusionTrainer):
    """Regression onto stored trajectories, or onto a teacher's own steps (consistency)."""
