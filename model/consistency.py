"""Consistency distillation on real latents, for causal generators as well (causal CD).

An initialisation that needs no stored trajectories: the teacher makes one step at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model.base import MethodConfig, Needs, RegressionMethod, teacher_problems
from model.causal import count_blocks, on_real_video, per_block
from model.experts import ExpertLevels, asking, draw_steps, scale_of
from model.flow import add_noise, expand, shift
from model.given import count_given, learnt, on_given
from model.guidance import guided_velocity
from model.types import Batch, LossOutput, Side
from utils.seeding import StepRNG


@dataclass(frozen=True)
class ConsistencyConfig(MethodConfig):
    """The teacher's steps, and what a block sees of the blocks before it."""

    cfg_scale: float = 4.0  # of the teacher's step; uncond + cfg_scale (cond - uncond), 1 = off
    batched_guidance: bool = True  # both passes in one batch; false: one by one, for less memory
    timestep_shift: float = 5.0  # of the grid of steps
    grid: int = 48  # Euler steps of the teacher from noise to data
    teacher_forcing: bool = True  # the clean past; false = the noisy one
    # Of a teacher of two experts, where cfg_scale is the high one's: that of the low one; None =
    # the same.
    cfg_scale_low: float | None = None
    boundary: float | None = (
        None  # the noise level from which on it is the high one; None = its own
    )

    def problems(self) -> Iterator[str]:
        """See MethodConfig."""
        yield from teacher_problems(self.cfg_scale, self.cfg_scale_low, self.boundary)
        if self.grid < 1:
            yield f"loss.grid: must be at least 1, got {self.grid}"
        if not self.timestep_shift > 0:
            yield f"loss.timestep_shift: must be positive, got {self.timestep_shift}"

    def expert_problems(
        self, experts: ExpertLevels | None, sides: Mapping[str, tuple[Side, ...]]
    ) -> Iterator[str]:
        """See MethodConfig."""
        del sides
        if experts is not None and "low" not in experts.sides:
            yield (
                "teacher.experts: the high expert alone has no target to be consistent with: that "
                "of its last level is what the low one says; use both, or low"
            )

    @property
    def levels(self) -> list[float]:
        """The grid's noise levels, from 1 down to 0."""
        return [shift(1.0 - i / self.grid, self.timestep_shift) for i in range(self.grid + 1)]


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
        among = draw_steps(
            self.parts.experts, rng.shared, config.levels[:-1], targets=config.levels[1:]
        )
        index = per_block(among.index(draws), layout, frames)
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
                cfg_scale=scale_of(among.side, config.cfg_scale, config.cfg_scale_low),
                context=asking(among.side),
                batched=config.batched_guidance,
            )
            nearer = x + expand(less - sigma) * velocity
            beyond = asking(among.target)
            target = student(nearer, less, batch.conditioning, context=beyond).x0
        x0 = student(x, sigma, batch.conditioning, context=asking(among.side)).x0
        given = count_given(batch.given)
        return LossOutput(F.mse_loss(learnt(x0, given), learnt(target, given)))
