"""What every method shares: its needs, its parts, and who takes turns."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from model.causal import CausalLayout
from model.experts import (
    WHOLE,
    ExpertLevels,
    Part,
    boundary_problems,
)
from model.types import Batch, LossOutput, Rollout, Sample, Side
from utils.seeding import SampleRNG, StepRNG


@dataclass(frozen=True)
class MethodConfig:
    """Settings of a method; each method's own class adds to it."""

    def problems(self) -> Iterator[str]:
        """What is impossible about these settings, one line each, keys with their section."""
        yield from ()

    def run_problems(self, *, steps: int, causal: bool) -> Iterator[str]:
        """What is impossible about them in a run of `steps` of such a generator."""
        del steps, causal
        yield from ()

    def list_problems(self, steps: Sequence[int]) -> Iterator[str]:
        """What is impossible about them for a student of this denoising_step_list."""
        del steps
        yield from ()

    def layer_problems(self, layers: int) -> Iterator[str]:
        """What is impossible about them for a teacher of so many blocks."""
        del layers
        yield from ()

    def expert_problems(
        self, experts: ExpertLevels | None, sides: Mapping[str, tuple[Side, ...]]
    ) -> Iterator[str]:
        """What is impossible about them where two experts divide the noise levels.

        experts: whose levels losses are at; None = one network's. sides: the experts that a role
        has; none = one network for all levels.
        """
        del experts, sides
        yield from ()


@dataclass(frozen=True)
class Needs:
    """What a method must be given, which may depend on its settings."""

    networks: tuple[str, ...] = ("generator",)  # roles that are Wan transformers
    trained: tuple[str, ...] = ("generator",)  # roles whose weights move
    # Of two experts in such a role, those that move, where it is not both.
    trained_sides: Mapping[str, tuple[Side, ...]] = field(default_factory=dict)
    latents: bool = False  # whether batches carry real latents
    because: str = ""  # the settings that ask for them, if the method alone does not
    trajectories: bool = False  # whether batches carry a teacher's stored states
    rollout: str | None = None  # where samples come from: a name in pipeline.build.ROLLOUTS
    rollout_options: Mapping[str, Any] = field(default_factory=dict)  # keywords of that factory
    sampler: str = "few_step"  # what samples the generator: a name in pipeline.build.SAMPLERS
    backbone: str | None = None  # the role whose features a discriminator reads, if there is one
    same_architecture: tuple[str, ...] = ()  # roles whose weights must fit each other
    # Of the generator, one for each step of a grid, see model.wan.heads; 0 = it ends as any other.
    heads: int = 0
    head_rate: float = 1.0  # how fast these learn, as a multiple of its learning rate

    @property
    def roles(self) -> tuple[str, ...]:
        """All roles, the discriminator included."""
        return self.networks if self.backbone is None else (*self.networks, "discriminator")


@dataclass(frozen=True, eq=False)
class Parts:
    """What the composition root hands to a method."""

    networks: Mapping[str, Any]  # by role: Denoisers, and the discriminator
    rollout: Rollout | None = None  # if the method needs one
    sigmas: Sequence[float] = ()  # noise levels of the few steps
    layout: CausalLayout | None = None  # how the generator's videos fall into blocks; None = whole
    experts: ExpertLevels | None = None  # whose noise levels losses are at; None = one network's
    parameters: Mapping[str, Sequence[nn.Parameter]] = field(default_factory=dict)  # a role's own
    takes_given: bool = False  # whether networks take frames that videos begin with as they are
    shift: float = 5.0  # of the few steps, and of a finer grid of the generator's steps

    def clean_frames(self, sample: Sample) -> Tensor | None:
        """The frames that a sample was given, which all networks see clean; None = they see none.

        Models that are not made for it see them noised as all others, and no loss is on them.
        """
        if not self.takes_given or not sample.given_frames:
            return None
        return sample.x0[:, :, : sample.given_frames].detach()


class Method(ABC):
    """A training objective over named roles."""

    config_class: ClassVar[type[MethodConfig]]
    trainer: ClassVar[str]  # whose phases it is trained in: a name in trainer.registry.TRAINERS

    def __init__(self, config: Any, parts: Parts) -> None:
        self.config = config
        self.parts = parts
        self.generator = parts.networks["generator"]

    @classmethod
    def needs(cls, config: Any) -> Needs:
        """What these settings need; by default a generator and its data's captions."""
        del config
        return Needs()

    @abstractmethod
    def generator_loss(self, batch: Batch, rng: StepRNG) -> LossOutput:
        """The loss whose gradient moves the generator."""

    def after_update(self, role: str) -> None:
        """Called after each update of `role`; by default nothing is to be done.

        Of two experts each is a role: generator.high, generator.low.
        """
        del role


class RegressionMethod(Method):
    """Teaches the generator to jump along a teacher's path."""

    trainer = "ode"


@dataclass(frozen=True)
class AlternatingConfig(MethodConfig):
    """Of methods where the generator and an opponent that scores its samples take turns."""

    timestep_shift: float = 5.0  # of the noise levels at which samples are scored
    min_sigma: float = 0.02
    max_sigma: float = 0.98
    generator_every: int = 5  # outer steps per generator update; the opponent moves at each
    # Where the generator moves, the opponent learns on the samples that moved it instead of its
    # own: a rollout less, of a generator that is one update older, and half of the prompts.
    reuse_rollout: bool = False

    @property
    def head_start(self) -> int:
        """Outer steps before the generator moves for the first time."""
        return 0

    def problems(self) -> Iterator[str]:
        """See MethodConfig."""
        if self.generator_every < 1:
            yield f"loss.generator_every: must be at least 1, got {self.generator_every}"
        if not self.timestep_shift > 0:
            yield f"loss.timestep_shift: must be positive, got {self.timestep_shift}"
        if not 0.0 < self.min_sigma <= self.max_sigma <= 1.0:
            yield (
                f"loss.min_sigma and loss.max_sigma: must satisfy 0 < min <= max <= 1, "
                f"got {self.min_sigma} and {self.max_sigma}"
            )

    def expert_problems(
        self, experts: ExpertLevels | None, sides: Mapping[str, tuple[Side, ...]]
    ) -> Iterator[str]:
        """See MethodConfig."""
        del sides
        for part in () if experts is None else map(experts.part, experts.sides):
            if self.max_sigma < part.low or self.min_sigma >= part.high:
                yield (
                    f"loss.min_sigma and loss.max_sigma: [{self.min_sigma}, {self.max_sigma}] has "
                    f"no noise level of the {part.side} expert, whose are from {part.low:g} to "
                    f"{part.high:g}"
                )

    def draw_sigma(self, rng: SampleRNG, like: Tensor, part: Part = WHOLE) -> Tensor:
        """Shifted uniform noise levels [B, 1], one per sample, on the device of `like`."""
        sigma = part.shifted(rng.rand((1,)).to(like.device), self.timestep_shift)
        return part.within(sigma, self.min_sigma, self.max_sigma)


def teacher_problems(
    cfg_scale: float, cfg_scale_low: float | None, boundary: float | None
) -> Iterator[str]:
    """What is impossible about how a teacher is asked, one line each."""
    for name, scale in (("cfg_scale", cfg_scale), ("cfg_scale_low", cfg_scale_low)):
        if scale is not None and not math.isfinite(scale):
            yield f"loss.{name}: must be finite, got {scale}"
    yield from boundary_problems("loss.boundary", boundary)
