"""Consistency distillation on real latents, for causal generators as well (causal CD).

An initialisation that needs no stored trajectories: the teacher makes one step at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model.base import MethodConfig, Needs, RegressionMethod
from model.causal import count_blocks, on_real_video, per_block
from model.flow import add_noise, expand, shift
from model.given import count_given, learnt, on_given
from model.guidance import guided_velocity
from model.types import Batch, LossOutput
from utils.seeding import StepRNG


@dataclass(frozen=True)
class ConsistencyConfig(MethodConfig):
    """The teacher's steps, and what a block sees of the blocks before it."""

    cfg_scale: float = 4.0  # of the teacher's step; uncond + cfg_scale (cond - uncond), 1 = off
    batched_guidance: bool = True  # both passes in one batch; false: one by one, for less memory
    timestep_shift: float = 5.0  # of the grid of steps
    grid: int = 48  # Euler steps of the teacher from noise to data
    teacher_forcing: bool = True  # the clean past; false = the noisy one

    def problems(self) -> Iterator[str]:
        """See MethodConfig."""
        if not math.isfinite(self.cfg_scale):
            yield f"loss.cfg_scale: must be finite, got {self.cfg_scale}"
        if self.grid < 1:
            yield f"loss.grid: must be at least 1, got {self.grid}"
        if not self.timestep_shift > 0:
            yield f"loss.timestep_shift: must be positive, got {self.timestep_shift}"


class Consistency(RegressionMethod):
    """|| x0(x_t) - stopgrad x0(x_s) ||^2, where x_s is one step of the teacher from x_t.

    Consistency distillation (arXiv:2303.01469, algorithm 2) with the student as its own target.
    The teacher must see what the student sees: block by block if the student is causal.
    """

    config_class = ConsistencyConfig
    config: ConsistencyConfig

    @classmethod
    def needs(cls, config: ConsistencyConfig) -> Needs:
        """A teacher, and real latents."""
        del config
        return Needs(networks=("generator", "teacher"), latents=True)

    def generator_loss(self, batch: Batch, rng: StepRNG) -> LossOutput:
        """Mean squared error over samples and elements."""
        config, layout, clean = self.config, self.parts.layout, batch.x0
        assert clean is not None, "consistency distillation needs real latents"
        frames = clean.shape[2]
        past = clean if config.teacher_forcing else None
        steps = torch.arange(config.grid, -1, -1, device=clean.device) / config.grid
        levels = shift(steps, config.timestep_shift)
        draws = rng.samples.rand((count_blocks(layout, frames),)).to(clean.device)
        index = per_block((draws * config.grid).long(), layout, frames)
        sigma, less = levels[index], levels[index + 1]
        x = add_noise(clean, rng.samples.randn(clean.shape[1:]), sigma)
        student, teacher = (
            on_given(on_real_video(self.parts.networks[role], layout, past), batch.given)
            for role in ("generator", "teacher")
        )
        with torch.no_grad():
            velocity = guided_velocity(
                teacher,
                x,
                sigma,
                batch.conditioning,
                batch.unconditional,
                cfg_scale=config.cfg_scale,
                batched=config.batched_guidance,
            )
            nearer = x + expand(less - sigma) * velocity
            target = student(nearer, less, batch.conditioning).x0
        x0, given = student(x, sigma, batch.conditioning).x0, count_given(batch.given)
        return LossOutput(F.mse_loss(learnt(x0, given), learnt(target, given)))
