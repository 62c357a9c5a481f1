"""A role: what a loss calls, the parameters that are its own, what moves them, what is saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from model.experts import SIDES, is_pair
from model.types import Batch, Denoiser, Rollout, Sample, Side
from utils.optim import (
    OptimizerConfig,
    build_optimizers,
    clip_gradients,
    initialise,
    lr_factor,
    set_lr_factor,
)
from utils.parallel import (
    ParallelConfig,
    fix_gradient_reduction,
    keep_gathered,
    sharded_roots,
    sync_gradients,
)
from utils.seeding import StepRNG


@dataclass(frozen=True, eq=False)
class Role:
    """A trained role. Its own parameters need not be all of `module`'s: other roles may share it.

    `module` holds them, under the names by which they are saved: a whole network, the networks
    that divide the noise levels, or a base with the adapters of several roles.
    """

    name: str
    network: nn.Module  # what losses call: a Denoiser, or a discriminator
    module: nn.Module
    parameters: Mapping[str, nn.Parameter]  # its own, by their names in `module`
    optimizers: Sequence[torch.optim.Optimizer]
    config: OptimizerConfig

    def requires_grad_(self, wanted: bool) -> None:
        """Whether losses gather gradients of its own parameters."""
        for parameter in self.parameters.values():
            parameter.requires_grad_(wanted)

    def sync_gradients(self, config: ParallelConfig, *, last: bool) -> None:
        """Say whether the next backward pass is the last before an update."""
        for root in sharded_roots(self.module):
            sync_gradients(root, config, last=last)

    def clip(self) -> Tensor:
        """Clip gradients; returns their norm before that, a scalar on the device."""
        return clip_gradients(list(self.parameters.values()), self.config.max_grad_norm)

    def step(self, update: int, total: int) -> None:
        """Make 0-based `update` of `total`, and clear the gradients."""
        set_lr_factor(self.optimizers, self.config, lr_factor(self.config, update, total))
        for optimizer in self.optimizers:
            optimizer.step()
        self.clear_gradients()

    def clear_gradients(self) -> None:
        """Forget what backward passes have left, after an update or instead of one."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    @property
    def learnt(self) -> bool:
        """Whether a backward pass has reached it since its last update; the same on all ranks."""
        return any(parameter.grad is not None for parameter in self.parameters.values())

    @property
    def lr(self) -> float:
        """The learning rate of the last update."""
        return float(self.optimizers[0].param_groups[0]["lr"])

    def weights(self) -> dict[str, Any]:
        """Its own parameters as they are saved."""
        state = self.module.state_dict()
        return {name: state[name] for name in self.parameters}

    def optimizer_state(self) -> dict[str, Any]:
        """The state of its optimizers as it is saved."""
        return get_optimizer_state_dict(self.module, list(self.optimizers))

    def load(self, weights: Mapping[str, Any], optimizer_state: Mapping[str, Any]) -> None:
        """Take back what `weights` and `optimizer_state` gave."""
        whole = len(self.parameters) == len(list(self.module.parameters()))
        self.module.load_state_dict(dict(weights), strict=whole)
        set_optimizer_state_dict(
            self.module, list(self.optimizers), optim_state_dict=dict(optimizer_state)
        )


@dataclass(frozen=True, eq=False)
class GatheredRollout:
    """A rollout through which the generator's weights stay gathered."""

    rollout: Rollout

    def __call__(self, generator: Denoiser, batch: Batch, rng: StepRNG, *, grad: bool) -> Sample:
        """See model.types.Rollout."""
        assert isinstance(generator, nn.Module), "a generator that is trained is a module"
        with keep_gathered(generator):
            return self.rollout(generator, batch, rng, grad=grad)


def build_roles(
    name: str,
    network: nn.Module,
    config: OptimizerConfig,
    own: Sequence[str] | None = None,
    rates: Mapping[str, float] | None = None,
    sides: Sequence[Side] = SIDES,
) -> dict[str, Role]:
    """The role of `network`; of two experts one for each of `sides`, as `name`.high and `name`.low.

    So each has its own optimizers, norm of gradients and updates. See `build_role`.
    """
    module = weights_of(network)
    if not is_pair(module):
        return {name: build_role(name, network, config, own, rates)}
    return {
        f"{name}.{side}": build_role(
            f"{name}.{side}",
            network,
            config,
            None if own is None else below(own, side),
            None if rates is None else {key: rates[f"{side}.{key}"] for key in below(rates, side)},
            module.get_submodule(side),
        )
        for side in sides
    }


def below(names: Iterable[str], part: str) -> list[str]:
    """The names within a part of a module, as that part has them."""
    return [name.removeprefix(f"{part}.") for name in names if name.startswith(f"{part}.")]


def group_of(role: str) -> str:
    """What phases call a role: an expert's is that of both, generator.high = generator."""
    return role.partition(".")[0]


def parameters_of(roles: Mapping[str, Role], group: str) -> dict[str, nn.Parameter]:
    """The parameters of a group's roles, by the names that its network has for them."""
    return {
        f"{prefix_of(name)}{key}": parameter
        for name, role in roles.items()
        if group_of(name) == group
        for key, parameter in role.parameters.items()
    }


def prefix_of(role: str) -> str:
    """What names of a role's parameters begin with in its network: high., low. or nothing."""
    side = role.partition(".")[2]
    return f"{side}." if side else ""


def weights_of(network: nn.Module) -> nn.Module:
    """The module that holds a network's weights."""
    module = network.model
    assert isinstance(module, nn.Module), "a network keeps its weights in `model`"
    return module


def build_role(
    name: str,
    network: nn.Module,
    config: OptimizerConfig,
    own: Iterable[str] | None = None,
    rates: Mapping[str, float] | None = None,
    module: nn.Module | None = None,
) -> Role:
    """The role of `network`, whose `model` holds the weights; own: names of its own, None = all.

    rates: how fast some of these learn, as multiples of the role's learning rate.
    module: the part of `model` that its own are in, and have their names from; None = all of it.

    All that it owns must want a gradient, and no forward pass may have come before (see
    `fix_gradient_reduction`).
    """
    module = weights_of(network) if module is None else module
    named = dict(module.named_parameters())
    parameters = named if own is None else {key: named[key] for key in own}
    optimizers = build_optimizers(parameters, config, rates)
    for root in sharded_roots(module):
        fix_gradient_reduction(root)
    initialise(module, optimizers)
    return Role(name, network, module, parameters, optimizers, config)
