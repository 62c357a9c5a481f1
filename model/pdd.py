"""Parallel decoding distillation (arXiv:2607.26004): many steps of a teacher's path per call.

Letters as in model/types.py; N steps of the teacher's grid, each with a head of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.base import MethodConfig, Needs, RegressionMethod, teacher_problems
from model.experts import ExpertLevels
from model.flow import TIMESTEPS, expand
from model.given import count_given, learnt, on_given
from model.guidance import guided_velocity
from model.heads import path_spans
from model.types import FULL_ATTENTION, Batch, LossOutput, Side
from model.wan.heads import Spans, levels_at
from utils.seeding import StepRNG


@dataclass(frozen=True)
class PDDConfig(MethodConfig):
    """The teacher's path, and how it is divided."""

    cfg_scale: float = 5.0  # of the teacher's path; uncond + cfg_scale (cond - uncond), 1 = off
    batched_guidance: bool = True  # both passes in one batch; false: one by one, for less memory
    # Blocks that the teacher's pass of the negative prompt leaves out; published: 10 of 1.3B, 12 of
    # 14B.
    uncond_skips: list[int] = field(default_factory=list)
    grid: int = 256  # steps of the teacher's path, N
    solver: Literal["euler", "midpoint"] = "euler"  # midpoint: twice the passes, for a coarser grid
    # Into how many calls the path is divided, drawn anew for each update: the numbers of steps in
    # which one training can be served.
    calls: list[int] = field(default_factory=lambda: [2, 4, 8])
    # Which calls of a sample's path have a loss: all, in one update; or one that is drawn, for the
    # memory of one.
    learn: Literal["all", "one"] = "all"
    head_rate: float = 1.0  # how fast the heads learn, as a multiple of generator.lr

    def problems(self) -> Iterator[str]:
        """See MethodConfig."""
        yield from teacher_problems(self.cfg_scale, None, None)
        if self.grid < 1:
            yield f"loss.grid: must be at least 1, got {self.grid}"
            return
        wrong = [n for n in self.calls if n < 1 or self.grid % n]
        if not self.calls or wrong or len(set(self.calls)) < len(self.calls):
            yield (
                f"loss.calls: must be different divisors of loss.grid={self.grid}, got {self.calls}"
            )
        if any(n < 0 for n in self.uncond_skips):
            yield f"loss.uncond_skips: must be blocks, counted from 0, got {self.uncond_skips}"
        if self.uncond_skips and self.cfg_scale == 1.0:
            yield "loss.uncond_skips: has no effect with loss.cfg_scale=1, without guidance"
        if not 0.0 < self.head_rate < float("inf"):
            yield f"loss.head_rate: must be positive and finite, got {self.head_rate}"

    def run_problems(self, *, steps: int, causal: bool) -> Iterator[str]:
        """See MethodConfig."""
        del steps
        if causal:
            yield (
                "generator_type: causal is not for distribution_loss: pdd, whose heads are for the "
                "path of a whole video; use bidirectional, and make its student causal after it"
            )

    def list_problems(self, steps: Sequence[int]) -> Iterator[str]:
        """See MethodConfig."""
        count = len(steps)
        equal = [TIMESTEPS * (count - n) / count for n in range(count)]
        if count not in self.calls or list(steps) != equal:
            lists = [
                [round(TIMESTEPS * (n - i) / n) for i in range(n)]
                for n in self.calls
                if n and TIMESTEPS % n == 0
            ]
            yield (
                f"denoising_step_list: a path is walked in equal steps, as many as one of "
                f"loss.calls={self.calls}: {' or '.join(map(str, lists))}; got {list(steps)}"
            )

    def layer_problems(self, layers: int) -> Iterator[str]:
        """See MethodConfig."""
        absent = [n for n in self.uncond_skips if n >= layers]
        if absent:
            yield (
                f"loss.uncond_skips: the teacher has blocks 0 to {layers - 1}, and no "
                f"{', '.join(map(str, absent))}; leave out one that it has, or none"
            )

    def expert_problems(
        self, experts: ExpertLevels | None, sides: Mapping[str, tuple[Side, ...]]
    ) -> Iterator[str]:
        """See MethodConfig."""
        if experts is not None or any(sides.values()):
            yield (
                "distribution_loss: pdd is for models of one network: a call of two experts' path "
                "would begin with one of them and end with the other; use dmd or phased_dmd"
            )


class PDD(RegressionMethod):
    """mean || u_k(X_n) - u_teacher(X_k) ||^2 for a drawn step k of each call of a path.

    A call begins at X_n, and one pass of the trunk there says the velocities u_n, u_n+1, ... of all
    its grid steps. X_k is where they lead, without gradient, and where the call ends the next one
    begins. Paths begin as noise that is keyed by the sample's draw, and are walked to their end
    within one loss, by the generator as it is: so no state outlives an update, and ranks,
    micro-batches and resumed runs agree with no word of their own.
    """

    config_class = PDDConfig
    config: PDDConfig

    @classmethod
    def needs(cls, config: PDDConfig) -> Needs:
        """A teacher, and heads; prompts are all the data."""
        return Needs(
            networks=("generator", "teacher"),
            sampler="path_euler",
            heads=config.grid,
            head_rate=config.head_rate,
        )

    def generator_loss(self, batch: Batch, rng: StepRNG) -> LossOutput:
        """Mean squared error over samples, calls and elements."""
        config = self.config
        # Shared: ranks that made unequal numbers of passes would leave sharded gathers unpaired.
        calls = config.calls[int(torch.randint(len(config.calls), (), generator=rng.shared))]
        learning = range(calls)
        if config.learn == "one":
            drawn = int(torch.randint(calls, (), generator=rng.shared))
            learning = range(drawn, drawn + 1)
        x = rng.samples.randn(batch.latent_shape)
        draws = rng.samples.rand((calls,)).to(x.device)
        losses = []
        for call in range(learning.stop):
            step = grid_step(draws[:, call], call, calls, config.grid)
            with torch.set_grad_enabled(call in learning):
                walk = self.walk(x, call, calls, step, batch)
            if call in learning:
                target = self.target(walk.inner, step, batch)
                given = count_given(batch.given)
                losses.append(F.mse_loss(learnt(walk.velocity, given), learnt(target, given)))
            x = walk.end
        return LossOutput(torch.stack(losses).mean())

    def walk(self, x: Tensor, call: int, calls: int, step: Tensor, batch: Batch) -> Walk:
        """One call from x [B, C, F, H, W]; step: [B], the grid step that is learnt of it."""
        own = path_spans(step, self.config.grid)
        whole = path_spans(torch.full_like(step, call), calls)
        before = torch.stack([whole[:, 0], own[:, 0]], dim=-1)
        spans = Spans(torch.stack([own, before, whole], dim=1), self.parts.shift)
        velocity = on_given(self.generator, batch.given)(
            x,
            self.sigma(whole[:, 0]),
            batch.conditioning,
            context=replace(FULL_ATTENTION, spans=spans),
        ).velocity
        to_inner, to_end = spans.said
        return Walk(velocity, self.moved(x, to_inner, before), self.moved(x, to_end, whole))

    @torch.no_grad()
    def target(self, x: Tensor, step: Tensor, batch: Batch) -> Tensor:
        """The teacher's velocity over grid steps [B] from x [B, C, F, H, W]."""
        own = path_spans(step, self.config.grid)
        velocity = self.guided(x, own[:, 0], batch)
        if self.config.solver == "euler":
            return velocity
        middle = own.mean(dim=1)
        half = torch.stack([own[:, 0], middle], dim=-1)
        return self.guided(self.moved(x, velocity, half), middle, batch)

    def guided(self, x: Tensor, position: Tensor, batch: Batch) -> Tensor:
        """The teacher's guided velocity at grid positions [B]."""
        return guided_velocity(
            on_given(self.parts.networks["teacher"], batch.given),
            x,
            self.sigma(position),
            batch.conditioning,
            batch.unconditional,
            cfg_scale=self.config.cfg_scale,
            context=replace(FULL_ATTENTION, skips=tuple(self.config.uncond_skips)),
            batched=self.config.batched_guidance,
        )

    def sigma(self, position: Tensor) -> Tensor:
        """Noise levels [B, 1], fp32, of grid positions [B]."""
        return levels_at(position, self.parts.shift).float()[:, None]

    def moved(self, x: Tensor, velocity: Tensor, spans: Tensor) -> Tensor:
        """x, moved along a velocity over spans [B, 2] of the grid; without gradient."""
        begin, end = levels_at(spans, self.parts.shift).unbind(dim=-1)
        return (x + expand((end - begin).float()[:, None]) * velocity).detach()


@dataclass(frozen=True, eq=False)
class Walk:
    """What one call says, and where it leads."""

    velocity: Tensor  # [B, C, F, H, W], of the grid step that is learnt, with its gradient
    inner: Tensor  # [B, C, F, H, W], where that step begins
    end: Tensor  # [B, C, F, H, W], where the next call begins


def grid_step(draws: Tensor, call: int, calls: int, grid: int) -> Tensor:
    """A grid step of a call for each uniform draw [B]; [B], counted from the path's begin."""
    length = grid // calls
    return call * length + (draws * length).long().clamp(max=length - 1)
