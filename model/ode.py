"""Regression onto a teacher's stored trajectories: how a causal generator begins (CausVid 4.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from model.base import MethodConfig, Needs, RegressionMethod
from model.causal import count_blocks, on_real_video, per_block
from model.experts import asking, draw_steps
from model.flow import on_device
from model.given import count_given, learnt, on_given
from model.types import Batch, LossOutput
from utils.seeding import StepRNG


@dataclass(frozen=True)
class ODEConfig(MethodConfig):
    """What a block sees of the blocks before it."""

    teacher_forcing: bool = False  # the clean past; false = as noisy as the trajectory has it there


class ODE(RegressionMethod):
    """|| x0(x_sigma) - x0 ||^2 along one trajectory, each block at one listed noise level."""

    config_class = ODEConfig
    config: ODEConfig

    @classmethod
    def needs(cls, config: ODEConfig) -> Needs:
        """Stored trajectories: states at the listed noise levels, then the end."""
        del config
        return Needs(trajectories=True)

    def generator_loss(self, batch: Batch, rng: StepRNG) -> LossOutput:
        """Mean squared error of x0 over samples and elements."""
        states = batch.trajectory
        assert states is not None, "an ODE batch carries trajectories"
        levels = on_device(self.parts.sigmas, states.device)
        target, frames = states[:, -1], states.shape[3]
        draws = rng.samples.rand((count_blocks(self.parts.layout, frames),)).to(states.device)
        among = draw_steps(self.parts.experts, rng.shared, self.parts.sigmas)
        index = per_block(among.index(draws), self.parts.layout, frames)
        where = index.expand(-1, frames)[:, None, None, :, None, None]
        x = states.gather(1, where.expand(-1, -1, *states.shape[2:]))[:, 0]
        clean = target if self.config.teacher_forcing else None
        net = on_given(on_real_video(self.generator, self.parts.layout, clean), batch.given)
        x0 = net(x, levels[index], batch.conditioning, context=asking(among.side)).x0
        given = count_given(batch.given)
        return LossOutput(F.mse_loss(learnt(x0, given), learnt(target, given)))
