"""One training step of a run without values: its real code, metered.

Networks are laid over pretended ranks by the run's own `parallelize`, and each phase is taken
through the loop's own `optimise`. What lies outside a step (data, encoders) has a stand-in here.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from model.base import Parts
from model.families.base import Model
from model.folders.loading import Placement
from model.types import Batch, Conditioning
from model.wan.cache import KeyValue, KVCache, TextKeys
from pipeline.blocks import CausalConfig
from trainer.base import Trainer
from trainer.build import build_networks, build_rollout, build_trained
from trainer.parts import TrainerParts
from trainer.registry import TRAINERS
from trainer.roles import Role, group_of
from trainer.run import Run
from utils import idle
from utils.distributed import Session
from utils.dry_run import Draw, dry_run
from utils.idle import Idle
from utils.metering import Meter, Peak, Place, Tag, on_host
from utils.op_costs import Transfer, Work
from utils.recompute import HostMemory, Waiting

T = TypeVar("T")
BUILD = "build"  # the phase in which networks are made
BASE = "base"  # whose weights are that several roles share, and none moves


@dataclass(frozen=True)
class World:
    """The machines that a run is planned for."""

    ranks: int
    per_node: int  # ranks that share fast links

    @property
    def nodes(self) -> int:
        """How many machines."""
        return -(-self.ranks // self.per_node)


@dataclass(frozen=True, eq=False)
class Trace:
    """What one step cost on rank 0."""

    standing: Mapping[Tag, int]  # bytes that lie there all the time
    peaks: Mapping[Place, Peak]
    work: Mapping[tuple[Place, Work], int]  # how often
    transfers: Mapping[tuple[Place, Transfer], int]
    phases: Mapping[str, int]  # how often each comes in the whole run


class Unread:
    """A model whose weights need not be there: `load_network` gives values to none."""

    random_network: Callable[[int, Placement], nn.Module]

    @classmethod
    def of(cls, model: Model) -> Any:
        """`model`, in a class of its own."""
        own = type(f"{cls.__name__}{type(model).__name__}", (cls, type(model)), {})
        unread: Any = object.__new__(own)
        unread.__dict__.update(model.__dict__)
        return unread

    def load_network(self, weights: object, place: Placement, *, what: str) -> nn.Module:
        """The network in the place of one with weights."""
        del weights, what
        return self.random_network(0, place)


class UnreadRun(Run):
    """A run that asks for no weights."""

    @property
    def reads_values(self) -> bool:
        """Not at all."""
        return False

    def random_init(self, role: str) -> bool:
        """None begins with values."""
        del role
        return False

    def weights(self, role: str) -> Any:
        """None are read."""
        del role


class MeteredCache(KVCache):
    """Tells the meter what it keeps."""

    meter: Meter

    def commit(self, frame_index: Tensor, layers: Sequence[KeyValue]) -> None:
        """See KVCache."""
        super().commit(frame_index, layers)
        kept = (t for pair in (*self._storage, *self._sink) for t in pair)
        self.meter.tag(kept, "generator", "kv cache")

    def keep_text(self, layers: Sequence[TextKeys]) -> None:
        """See KVCache."""
        super().keep_text(layers)
        self.meter.tag((t for keys in layers for t in keys), "generator", "kv cache")


@dataclass(frozen=True)
class MeteredCausal(CausalConfig):
    """A layout whose caches tell what they keep."""

    meter: Any = None

    def new_cache(self, frames: int) -> KVCache:
        """See CausalLayout."""
        cache = super().new_cache(frames)
        cache.__class__ = MeteredCache
        assert isinstance(cache, MeteredCache)
        cache.meter = self.meter
        return cache


class Spokesman(Session):
    """A rank whose peers are pretended: what all ranks tell each other, it tells itself."""

    def any(self, flag: bool) -> bool:
        """See Session."""
        return flag

    def most_of(self, *numbers: int) -> tuple[int, ...]:
        """See Session."""
        return numbers

    def from_main(self, value: str) -> str:
        """See Session."""
        return value

    def gather(self, value: T) -> list[T]:
        """See Session."""
        return [value] * self.world_size


class StandInBatches:
    """Batches of the run's shapes; each begins a micro-batch on the meter."""

    def __init__(self, run: Run, meter: Meter) -> None:
        self.run = run
        self.meter = meter
        self.begun = 0

    def __call__(self, draws: int, indices: Sequence[int]) -> Batch:
        """See BatchLoader."""
        del draws
        self.meter.turn, self.begun = self.begun, self.begun + 1
        return stand_in_batch(self.run, len(indices))

    def prefetch(self, draws: int, indices: Sequence[int]) -> None:
        """Nothing is read."""

    def close(self) -> None:
        """Nothing is open."""


def stand_in_batch(run: Run, count: int) -> Batch:
    """A batch of `count` samples as the encoders would give it, without values."""
    channels, frames, height, width = run.latent_shape
    model, needs = run.model, run.needs
    text = torch.zeros(count, model.text.length, model.text.width, dtype=run.compute)
    video = (count, channels, frames, height, width)
    conditioning = Conditioning(text, *_stand_in_images(run, video))
    given = run.given_share > 0.0
    x0 = torch.zeros(video) if needs.latents or given else None
    states = (count, len(run.sampling.sigmas) + 1, *video[1:])
    return Batch(
        conditioning=conditioning,
        unconditional=replace(conditioning, text=torch.zeros_like(text)),
        latent_shape=run.latent_shape,
        x0=x0,
        given=x0[:, :, :1] if given and x0 is not None else None,
        trajectory=torch.zeros(states) if needs.trajectories else None,
    )


def _stand_in_images(run: Run, video: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
    model = run.model
    if model.images is None or not run.reads_images:
        return None, None
    count, channels, frames, height, width = video
    images = model.images
    mask = model.latent.temporal_stride
    given = torch.zeros(count, mask + channels, frames, height, width)
    if not images.clip:
        return None, given
    states = (count, images.tokens * images.count, images.width)
    return torch.zeros(states, dtype=run.compute), given


def planned(run: Run, meter: Meter) -> Run:
    """The run, told to read no weights and to report its caches."""
    sampling = run.sampling
    if sampling.causal is not None:
        values = {f.name: getattr(sampling.causal, f.name) for f in fields(CausalConfig)}
        sampling = replace(sampling, causal=MeteredCausal(**values, meter=meter))
    values = {f.name: getattr(run, f.name) for f in fields(Run)}
    values["models"] = {role: Unread.of(model) for role, model in run.models.items()}
    # A graph does what its operations do; how it fuses them is a matter of time alone.
    parallel = replace(
        run.config.parallel, compile=False, attention="auto", masked_attention="auto"
    )
    values["config"] = replace(run.config, parallel=parallel)
    return UnreadRun(**{**values, "sampling": sampling})


def build_stand_in(run: Run, session: Session, meter: Meter, *, on_gpu: bool) -> Trainer:
    """The run's trainer with its real networks, roles, method and average."""
    networks = build_networks(run, session)
    for name, network in networks.items():
        meter.watch(name, network)
    tag_weights(meter, networks, {})
    roles = build_trained(run, networks)
    if on_gpu:
        use_fused(roles)
    parts = Parts(
        networks=networks,
        rollout=build_rollout(run, None),
        sigmas=run.sampling.sigmas,
        shift=run.sampling.shift,
        layout=run.causal,
        experts=run.experts,
        parameters={name: list(role.parameters.values()) for name, role in roles.items()},
        takes_given=run.takes_given,
    )
    batches: Any = StandInBatches(run, meter)
    trainer: Trainer = TRAINERS[run.config.trainer].load()(
        TrainerParts(
            run=run,
            session=session,
            method=run.method(run.config.loss, parts),
            roles=roles,
            batches=batches,
            trackers=(),
            validator=None,
            logdir=Path(),
            save=False,
        )
    )
    trainer.finite = lambda _: True  # type: ignore[assignment,method-assign]  # no values
    tag_standing(meter, trainer, networks)
    return trainer


@contextmanager
def host_memory(meter: Meter) -> Iterator[None]:
    """Within the body, what waits in host memory says so: it is not the device's."""
    put, brought = HostMemory.put, Idle.brought

    def told(self: HostMemory, tensor: Tensor) -> Waiting:
        with on_host():
            return put(self, tensor)

    def hosted(tensor: Tensor, *, pin: bool) -> Tensor:
        del pin
        with on_host():
            return torch.empty_like(tensor, requires_grad=False)

    def copied(self: Idle, host: Tensor) -> Tensor:
        del self
        copy = torch.empty_like(host)
        meter.tag([copy], BASE, "weights")
        return copy

    HostMemory.put, Idle.brought = told, copied  # type: ignore[method-assign]
    before, idle.hosted = idle.hosted, hosted
    try:
        yield
    finally:
        HostMemory.put, Idle.brought = put, brought  # type: ignore[method-assign]
        idle.hosted = before


def use_fused(roles: Mapping[str, Role]) -> None:
    """Let AdamW step as it does on a GPU, in one kernel; here it took the CPU's way."""
    for role in roles.values():
        for optimizer in role.optimizers:
            if isinstance(optimizer, torch.optim.AdamW):
                for group in optimizer.param_groups:
                    group["fused"], group["foreach"] = True, False


def tag_weights(meter: Meter, networks: Mapping[str, nn.Module], roles: Mapping[str, Role]) -> None:
    """Say whose each weight is: its role's own, or of a network that several share."""
    shared = Counter(id(network.model) for network in networks.values())
    for name, network in networks.items():
        owner = BASE if shared[id(network.model)] > 1 else name
        meter.tag(network.parameters(), owner, "weights")
    for name, role in roles.items():
        meter.tag(role.parameters.values(), group_of(name), "weights")


def tag_standing(meter: Meter, trainer: Trainer, networks: Mapping[str, nn.Module]) -> None:
    """Say what of a trainer lies in memory all the time."""
    tag_weights(meter, networks, trainer.roles)
    for name, role in trainer.roles.items():
        for optimizer in role.optimizers:
            states = (t for state in optimizer.state.values() for t in state.values())
            meter.tag((t for t in states if isinstance(t, Tensor)), group_of(name), "optimizer")
    meter.tag(trainer.ema.shadow.values(), "generator", "average")


def tag_gradients(meter: Meter, roles: Mapping[str, Role]) -> None:
    """Say which memory holds gradients now, whole or of a shard."""
    for name, role in roles.items():
        grads = (p.grad for p in role.parameters.values() if p.grad is not None)
        meter.tag(grads, group_of(name), "gradients")
        meter.tag(whole_gradients(role), group_of(name), "gradients")


def whole_gradients(role: Role) -> Iterator[Tensor]:
    """Those that FSDP2 keeps of a role's whole weights until they are reduced."""
    own = set(map(id, role.parameters.values()))
    for part in role.module.modules():
        if not isinstance(part, FSDPModule):
            continue
        group = part._get_fsdp_state()._fsdp_param_group
        for parameter in group.fsdp_params if group is not None else ():
            mine = id(parameter.sharded_param) in own
            if mine and parameter.unsharded_accumulated_grad is not None:
                yield parameter.unsharded_accumulated_grad


def fullest_step(trainer: Trainer) -> int:
    """A step with as many phases as any."""
    return max(range(trainer.config.steps), key=lambda step: len(list(trainer.phases(step))))


def trace_step(run: Run, world: World, draw: Draw, *, on_gpu: bool = True) -> Trace:
    """Take a step of `run` with all of its phases; draw: which end of what is drawn.

    on_gpu: as a GPU would run it, else as a CPU does.
    """
    meter = Meter()
    with (
        dry_run(world_size=world.ranks, per_node=world.per_node, draw=draw, on_gpu=on_gpu),
        host_memory(meter),
    ):
        device, group = torch.device("cpu"), run.config.parallel.context
        session = Spokesman(0, world.ranks, device, group=group)
        trace = metered_step(run, session, meter, on_gpu=on_gpu)
        gc.collect()  # experts that take turns go back to the host when they are dropped: here
        return trace


def metered_step(run: Run, session: Session, meter: Meter, *, on_gpu: bool) -> Trace:
    """Build a run's trainer on this process's ranks, and meter the fullest of its steps."""
    with meter, meter.within(BUILD):
        trainer = build_stand_in(planned(run, meter), session, meter, on_gpu=on_gpu)
    meter.look = lambda: tag_gradients(meter, trainer.roles)
    trainer.state.step = fullest_step(trainer)
    standing = {tag: count for tag, count in meter.live.items() if count}
    for counted in (meter.work, meter.transfers, meter.peaks):
        counted.clear()
    with meter:
        for phase in trainer.phases(trainer.state.step):
            batches: Any = trainer.parts.batches
            batches.begun = 0
            with meter.within(phase.name):
                trainer.optimise(phase)
    steps = (phase.name for step in range(run.config.steps) for phase in trainer.phases(step))
    meter.look = lambda: None  # it holds the trainer
    return Trace(standing, dict(meter.peaks), meter.work, meter.transfers, Counter(steps))
