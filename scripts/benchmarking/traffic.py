"""Bytes that a rank receives in a training step: counted collective by collective; a formula."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.base import Trainer

REDUCED = 4  # bytes per value of a gradient on its way: they are reduced in fp32
GATHERS = ("_allgather_base_", "all_gather_into_tensor")
SCATTERS = ("_reduce_scatter_base_", "reduce_scatter_tensor")


@dataclass(frozen=True)
class Traffic:
    """Received bytes of one rank, by what they are for."""

    gathered: int = 0  # weights, for a pass through their block
    scattered: int = 0  # gradients, summed to the shards
    replicated: int = 0  # gradients of shards, shared between replicas

    @property
    def total(self) -> int:
        """All of it."""
        return self.gathered + self.scattered + self.replicated

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.gathered + other.gathered,
            self.scattered + other.scattered,
            self.replicated + other.replicated,
        )


class TrafficMeter(TorchDispatchMode):
    """Counts what this rank receives in collectives of more than a few numbers.

    Of n ranks that gather or scatter S bytes, each receives S (n - 1) / n; of n that all-reduce S
    bytes, twice that (a ring).
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        space, _, name = function._schema.name.partition("::")
        if space == "c10d":
            self._count(name, args)
        return function(*args, **(kwargs or {}))

    def traffic(self) -> Traffic:
        """What was counted."""
        return Traffic(self.bytes["gathered"], self.bytes["scattered"], self.bytes["replicated"])

    def _count(self, name: str, args: Any) -> None:
        if name in GATHERS:
            self.bytes["gathered"] += args[0].nbytes - args[1].nbytes
        elif name in SCATTERS:
            self.bytes["scattered"] += args[1].nbytes - args[0].nbytes
        elif name == "allreduce_":
            ranks = dist.ProcessGroup.unbox(args[1]).size()
            sizes = [
                tensor.nbytes for tensor in args[0] if tensor.numel() > 1
            ]  # no norms, no flags
            self.bytes["replicated"] += sum(2 * size * (ranks - 1) // ranks for size in sizes)


class PassMeter:
    """Counts calls of each role's network, and how many of them learn."""

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self.forwards: Counter[str] = Counter()
        self.learning: Counter[str] = Counter()
        self._handles = [
            network.register_forward_pre_hook(self._counter(role))
            for role, network in networks.items()
        ]

    def close(self) -> None:
        """Count no more."""
        for handle in self._handles:
            handle.remove()

    def _counter(self, role: str) -> Any:
        def count(network: nn.Module, arguments: Any) -> None:
            del arguments
            self.forwards[role] += 1
            learns = any(parameter.requires_grad for parameter in network.parameters())
            self.learning[role] += learns and torch.is_grad_enabled()

        return count


def padded_values(parameters: Iterable[nn.Parameter], ranks: int) -> int:
    """Values of weights that are split by rows over `ranks`, rows filled up to a multiple."""
    return sum(-(-p.shape[0] // ranks) * ranks * p.shape[1:].numel() for p in parameters)


@dataclass(frozen=True)
class Passes:
    """What one step does with a network."""

    forwards: int  # calls, with and without a gradient
    learning: int  # of these, those with one
    backwards: int  # backward passes, each through one or more calls: one per micro-batch
    scatters: int  # of these, those that end with a reduction
    updates: int


@dataclass(frozen=True)
class Layout:
    """How a network lies over the ranks."""

    blocks: int  # values of the weights in blocks, padded
    rest: int  # of all other weights, which FSDP2 keeps as one unit
    shards: int
    replicas: int = 1
    compute_bytes: int = 4  # per value of a weight on its way

    def traffic(self, passes: Passes) -> Traffic:
        """What FSDP2 moves for this network in one step.

        With s shards, a rank that gathers or scatters P values receives P (s - 1) / s of them.
        Every forward pass gathers all units once, in the compute dtype. A backward pass gathers
        each block once more for every call that it passes through (a rollout has several), and the
        rest once; and if it scatters, it scatters each unit's gradients once, in fp32, since
        autograd has summed them over the calls. Where several micro-batches scatter together,
        blocks with several calls scatter once more, before that sum is there. With r replicas each
        update all-reduces the shard's gradients, P / s, of which a rank receives 2 (r - 1) / r. P
        counts rows that are filled up. What is recomputed is not gathered again; norms are left
        out.
        """
        blocks, rest = (n - n // self.shards for n in (self.blocks, self.rest))
        gathered = (passes.forwards + passes.learning) * blocks
        gathered += (passes.forwards + passes.backwards) * rest
        early = passes.scatters < passes.backwards < passes.learning
        part = (self.blocks + self.rest) // self.shards
        return Traffic(
            gathered=gathered * self.compute_bytes,
            scattered=passes.scatters * ((1 + early) * blocks + rest) * REDUCED,
            replicated=passes.updates * (2 * part * REDUCED * (self.replicas - 1) // self.replicas),
        )


def layout_of(network: nn.Module, compute_bytes: int) -> Layout | None:
    """How a network lies over the ranks; None = each rank has all of it."""
    module = network.get_submodule("model")
    if not isinstance(module, FSDPModule):
        return None
    inside = list(module.get_submodule("blocks").parameters())
    chosen = set(map(id, inside))
    rest = [p for p in module.parameters() if id(p) not in chosen]
    some = inside[0]
    assert isinstance(some, DTensor), "FSDP2 keeps weights as DTensors"
    *replicas, shards = some.device_mesh.shape
    return Layout(
        padded_values(inside, shards),
        padded_values(rest, shards),
        shards,
        replicas[0] if replicas else 1,
        compute_bytes,
    )


def measured_traffic(
    trainer: Trainer, step: Callable[[Trainer], object]
) -> tuple[Traffic, Traffic]:
    """One more step's traffic: counted, and by the formula. Collective.

    The formula does not know of weights that stay gathered (parallel.keep_gathered).
    """
    networks = trainer.method.parts.networks
    meter, before = PassMeter(networks), Counter(trainer.state.updates)
    with TrafficMeter() as counted:
        step(trainer)
    meter.close()
    expected = Traffic()
    for role, network in networks.items():
        layout = layout_of(network, trainer.parts.run.compute.itemsize)
        if layout is not None:
            updates = Counter(trainer.state.updates)[role] - before[role]
            backwards = updates * trainer.config.accumulation
            last = trainer.config.parallel.reduce_gradients == "last"
            calls = meter.forwards[role], meter.learning[role]
            expected += layout.traffic(
                Passes(*calls, backwards, updates if last else backwards, updates)
            )
    return counted.traffic(), expected
