"""Two experts in a run: which of them each role has, and where they meet.

A model of two experts is one role's, or one of its two is (`<role>.experts`), which is a model of
one network then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from model.base import Needs
from model.experts import SIDES, ExpertLevels, side_of
from model.families.base import Model
from model.types import Side
from trainer.config import Config
from utils.config import ConfigError


@dataclass(frozen=True, eq=False)
class Opened:
    """A role's model, and the folder's if that holds two experts of which it is one."""

    whole: Model
    only: Side | None = None

    @property
    def model(self) -> Model:
        """What the role has. Raises UserError for an expert of a folder that holds none."""
        return self.whole if self.only is None else self.whole.only(self.only)

    @property
    def boundary(self) -> float | None:
        """Where the folder's experts meet; None = it holds one network."""
        experts = self.whole.experts
        return None if experts is None else experts.boundary

    @property
    def sides(self) -> tuple[Side, ...]:
        """The experts that the role has; none = one network for all noise levels."""
        if self.boundary is None:
            return ()
        return SIDES if self.only is None else (self.only,)


def open_models(
    config: Config, roles: Sequence[str], find: Callable[[Path, str], Model]
) -> dict[str, Opened]:
    """The models of some roles; find: what opens one, from the folder of all and its name."""
    root = Path(config.model_root)
    return {
        role: Opened(find(root, config.model_of(role)), config.networks[role].experts)
        for role in roles
    }


def gate(
    config: Config, needs: Needs, opened: Opened, few_steps: Sequence[float] | None
) -> float | None:
    """The noise level from which on the generator's high expert is asked; None = there is no other.

    few_steps: its noise levels, if it makes clips in few steps; then it lies strictly between two
    of them, so that no rounding moves a step from one expert to the other. Raises ConfigError.
    """
    asked = config.sampling.boundary
    divided = len(opened.sides) == len(SIDES) or (opened.only and needs.rollout == "phased")
    if opened.boundary is None or not divided:
        for name in ("boundary", "cfg_scale_low"):
            if getattr(config.sampling, name) is not None:
                raise ConfigError(
                    f"sampling.{name}: is for two experts, and the generator has one network for "
                    f"all noise levels ({opened.whole.path}, generator.experts={opened.only}); "
                    f"leave it out"
                )
        return None
    if few_steps is None:
        return opened.boundary if asked is None else asked
    if asked is None:
        return between(few_steps, opened.boundary)
    if not few_steps[-1] < asked < few_steps[0] or asked in few_steps:
        raise ConfigError(
            f"sampling.boundary: must lie strictly between two of the student's noise levels "
            f"{_listed(few_steps)}, got {asked}; use {' or '.join(_middles(few_steps))}, or null"
        )
    return asked


def between(few_steps: Sequence[float], boundary: float) -> float:
    """The middle between the two of the few steps around the boundary; one on it is the low one's.

    Raises ConfigError unless there is one above and one at or below it.
    """
    low = [sigma for sigma in few_steps if side_of(boundary, sigma) == "high"]
    high = few_steps[: len(few_steps) - len(low)]
    if not low:
        raise ConfigError(
            f"denoising_step_list: none of the noise levels {_listed(few_steps)} is at or below "
            f"{boundary:g}, where the low expert begins, so it would never be asked; add steps, or "
            f"set generator.experts=high"
        )
    return (high[-1] + low[0]) / 2.0


def loss_levels(
    config: Config, needs: Needs, opened: Mapping[str, Opened], few_steps: Sequence[float] | None
) -> ExpertLevels | None:
    """The experts whose noise levels losses are at: the teacher's, else the generator's.

    None = one network for all. Losses of a generator of few steps alone are at these, which meet
    where they do in sampling. Raises ConfigError for settings that contradict each other.
    """
    reference = "teacher" if "teacher" in needs.networks else "generator"
    boundary, asked = opened[reference].boundary, asdict(config.loss).get("boundary")
    levels = None
    if boundary is not None:
        if asked is None and reference == "generator" and few_steps is not None:
            asked = config.sampling.boundary or between(few_steps, boundary)
        levels = ExpertLevels(boundary if asked is None else asked, opened[reference].sides)
    found = list(problems(config, needs, levels, opened, reference))
    if found:
        raise ConfigError("\n".join(found))
    return levels


def problems(
    config: Config,
    needs: Needs,
    levels: ExpertLevels | None,
    opened: Mapping[str, Opened],
    reference: str,
) -> Iterator[str]:
    """What models of one or two experts cannot do, one line each."""
    pairs = [role for role, found in opened.items() if found.boundary is not None]
    if levels is None:
        for name in ("boundary", "cfg_scale_low"):
            if asdict(config.loss).get(name) is not None:
                yield (
                    f"loss.{name}: is for models of two experts; the {reference}'s "
                    f"{opened[reference].whole.path} has one network for all noise levels; leave "
                    f"it out"
                )
    if pairs and config.generator_type == "causal":
        yield (
            f"generator_type: causal is not for models of two experts, as the {pairs[0]}'s: keys "
            f"of a past belong to one network, so each block would have to be remembered twice; "
            f"use bidirectional, or models of one network"
        )
    if needs.backbone is not None and len(opened[needs.backbone].sides) > 1:
        yield (
            f"trainer: a discriminator reads the features of one network, and the {needs.backbone} "
            f"is of two experts; train without one (loss.gan_weight=0, "
            f"loss.divergence=reverse_kl), or name one of them by {needs.backbone}.experts"
        )
    sides = {role: found.sides for role, found in opened.items()}
    yield from config.loss.expert_problems(levels, sides)


def offloads(config: Config, opened: Mapping[str, Opened]) -> list[str]:
    """The roles whose idle expert waits in host memory. Raises ConfigError if there are none."""
    if not config.parallel.offload_idle_expert:
        return []
    pairs = [role for role, found in opened.items() if len(found.sides) == len(SIDES)]
    kept = [role for role in pairs if config.frozen(role) is not None]
    if not kept:
        raise ConfigError(
            "parallel.offload_idle_expert: is for two experts that are used as they are, and no "
            "role here has any (a teacher of two, or adapters on two); leave it out"
        )
    return kept


def check_offload(config: Config, roles: Sequence[str], ranks: int) -> None:
    """Raise ConfigError unless each of several ranks has all weights of experts that take turns."""
    for role in roles:
        frozen = config.frozen(role)
        if ranks > 1 and frozen is not None and not frozen.whole:
            raise ConfigError(
                f"parallel.offload_idle_expert: the experts of the {role} are sharded over {ranks} "
                f"ranks, and shards do not move; set {role}.sharded=false, or leave it out"
            )


def _listed(sigmas: Sequence[float]) -> str:
    return ", ".join(f"{sigma:.4g}" for sigma in sigmas)


def _middles(sigmas: Sequence[float]) -> list[str]:
    return [f"{(a + b) / 2.0:.4f}" for a, b in pairwise(sigmas)]
