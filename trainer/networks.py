"""Settings of the networks of a run, role by role: where they come from, what moves, and how."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from model.adapters import AdapterConfig
from model.experts import SIDES
from utils.optim import OptimizerConfig


@dataclass(frozen=True)
class NetworkConfig:
    """A network that is used as it is."""

    model: str | None = None  # folder, or name below model_root; None = the generator's
    weights: str | None = None  # file or training checkpoint instead of the folder's weights
    # Of a folder of two experts: the one that is used, as a network for all noise levels that it
    # meets; null = both.
    experts: Literal["high", "low"] | None = None
    weights_high: str | None = None  # of two experts, where the high one's are elsewhere
    weights_low: str | None = None  # and the low one's
    storage: Literal["fp8"] | None = None  # of its blocks' matrices; None = what is computed in
    sharded: bool | None = None  # false: each rank holds a copy; None = false with fp8, else true
    adapters: list[str] = field(default_factory=list)  # added as they are: files, or file:scale

    @property
    def whole(self) -> bool:
        """Whether each rank holds all of it."""
        return self.storage is not None if self.sharded is None else not self.sharded


@dataclass(frozen=True)
class TrainedNetworkConfig(OptimizerConfig):
    """A network whose weights move, or an adapter of one that does not."""

    model: str | None = None  # folder, or name below model_root; None = the teacher's, if any
    weights: str | None = None  # file or training checkpoint instead of the folder's weights
    experts: Literal["high", "low"] | None = None  # as the teacher's, and these two
    weights_high: str | None = None
    weights_low: str | None = None
    random_init: bool = False  # start from random weights, drawn from the seed
    adapter: AdapterConfig = field(default_factory=AdapterConfig)  # what is trained in its place
    # Of the network under an adapter, which does not move; roles that agree in all of these, in
    # model and in weights share one. null = the teacher's.
    storage: Literal["fp8"] | None = None
    sharded: bool | None = None
    adapters: list[str] = field(default_factory=list)  # as the teacher's

    def problems(self, role: str) -> Iterator[str]:
        """What is impossible about these settings of `role`, one line each."""
        yield from self.adapter.problems(role)
        if self.adapter.rank is not None:
            if self.random_init:
                yield f"{role}.random_init: an adapter needs a network that has learnt something"
            return
        for name in ("storage", "sharded", "adapters"):
            if getattr(self, name) not in (None, []):
                yield (
                    f"{role}.{name}: is for networks that stay as they are, under an adapter; set "
                    f"{role}.adapter.rank, or merge adapters first (convert_checkpoint.py)"
                )


def expert_problems(role: str, network: NetworkConfig | TrainedNetworkConfig) -> Iterator[str]:
    """Weights of experts that nobody would read."""
    for side in SIDES:
        key = f"weights_{side}"
        if getattr(network, key) is None:
            continue
        if network.experts is not None:
            yield (
                f"{role}.{key}: has no effect with {role}.experts={network.experts}, one network; "
                f"set {role}.weights"
            )
        elif isinstance(network, TrainedNetworkConfig) and network.random_init:
            yield f"{role}.{key}: cannot be given together with {role}.random_init"


def optimizer_problems(name: str, config: OptimizerConfig) -> Iterator[str]:
    """What is impossible about how a role's weights move, one line each."""
    if not 0.0 < config.lr < float("inf"):
        yield f"{name}.lr: must be positive and finite, got {config.lr}"
    if config.muon_lr is not None and not 0.0 < config.muon_lr < float("inf"):
        yield f"{name}.muon_lr: must be positive and finite, or null, got {config.muon_lr}"
    if not 0.0 <= config.muon_momentum < 1.0:
        yield f"{name}.muon_momentum: must lie in [0, 1), got {config.muon_momentum}"
    if len(config.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in config.betas):
        yield f"{name}.betas: must be two numbers in [0, 1), got {config.betas}"
    if config.max_grad_norm <= 0:
        yield f"{name}.max_grad_norm: must be positive, got {config.max_grad_norm}"
    at_least_zero = {
        "warmup_updates": config.warmup_updates,
        "weight_decay": config.weight_decay,
        "muon_weight_decay": config.muon_weight_decay,
    }
    for key, value in at_least_zero.items():
        if value < 0:
            yield f"{name}.{key}: must be at least 0, got {value}"
    for key, share in (("decay_from", config.decay_from), ("decay_to", config.decay_to)):
        if not 0.0 <= share <= 1.0:
            yield f"{name}.{key}: must lie in [0, 1], got {share}"


def head_problems(method: str, generator: TrainedNetworkConfig) -> Iterator[str]:
    """Why a head for each part of a path cannot be copied to a generator, or would lie idle."""
    if generator.random_init:
        yield (
            f"generator.random_init: the heads of {method} begin as copies of one that has learnt "
            f"something; begin with the teacher's weights"
        )
    if generator.adapter.targets != "blocks":
        yield (
            f"generator.adapter.targets: {generator.adapter.targets} adds to the last layer too, "
            f"in whose place {method} has heads of its own; set it to blocks"
        )
