"""Training steps, timed: ours, and the plain version's in turns with them."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from model.types import Batch, LossOutput
from scripts.benchmarking.meters import Clock, FlopMeter, LivePeak, device_name, peak_flops
from scripts.benchmarking.rows import Row
from scripts.benchmarking.traffic import measured_traffic
from scripts.benchmarking.yardstick import PlainTraining, sizes_of, unlike
from trainer.base import Trainer
from trainer.batches import BatchLoader
from utils.ema import EMA, local
from utils.seeding import StepRNG


@dataclass(frozen=True)
class Rounds:
    """How much is timed."""

    warmup: int
    timed: int
    plain: bool  # whether the plain version takes turns with ours
    save: bool  # whether a checkpoint is written, to time it


class TimedLoader:
    """A BatchLoader whose calls are timed: what a step waits for its data."""

    def __init__(self, loader: BatchLoader) -> None:
        self.loader = loader
        self.seconds = 0.0
        self.served: list[Batch] = []

    def __call__(self, draws: int, indices: Sequence[int]) -> Batch:
        """See BatchLoader."""
        begin = time.perf_counter()
        batch = self.loader(draws, indices)
        self.seconds += time.perf_counter() - begin
        self.served.append(batch)
        return batch

    def take(self) -> tuple[float, list[Batch]]:
        """Seconds and batches since the last call."""
        taken = self.seconds, self.served
        self.seconds, self.served = 0.0, []
        return taken

    def prefetch(self, draws: int, indices: Sequence[int]) -> None:
        """See BatchLoader."""
        self.loader.prefetch(draws, indices)

    def close(self) -> None:
        """See BatchLoader."""
        self.loader.close()


@dataclass(eq=False)
class Measured:
    """One figure per timed step; losses of all steps."""

    ours: Clock
    plain: Clock
    kinds: list[int] = field(default_factory=list)  # how many phases it had
    data_wait: list[float] = field(default_factory=list)  # s
    flops: list[int] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    plain_losses: list[Tensor] = field(default_factory=list)

    def step_s(self, seconds: Sequence[float]) -> float:
        """The mean over kinds of steps, as often as they come, of each kind's median."""
        of: dict[int, list[float]] = {}
        for kind, value in zip(self.kinds, seconds, strict=True):
            of.setdefault(kind, []).append(value)
        return sum(len(some) * statistics.median(some) for some in of.values()) / len(seconds)

    @property
    def difference(self) -> float | None:
        """The largest relative difference of a loss."""
        if not self.plain_losses:
            return None
        ours, theirs = torch.stack(self.losses).double(), torch.stack(self.plain_losses).double()
        return float(((ours - theirs).abs() / theirs.abs().clamp(min=1e-12)).max())


def start_from_now(trainer: Trainer) -> None:
    """Let the average begin with the weights as they are: they were changed since it was made."""
    trainer.ema = EMA(trainer.roles["generator"].parameters, trainer.config.ema)


def take_step(trainer: Trainer) -> list[Tensor]:
    """One outer step without its hooks; returns each phase's loss."""
    losses: list[Tensor] = []

    def kept(
        loss: Callable[[Batch, StepRNG], LossOutput], batch: Batch, rng: StepRNG
    ) -> LossOutput:
        output = loss(batch, rng)
        losses.append(output.loss.detach())
        return output

    for phase in trainer.phases(trainer.state.step):
        trainer.optimise(replace(phase, loss=partial(kept, phase.loss)))
    trainer.state.step += 1
    return losses


def time_steps(trainer: Trainer, rounds: Rounds, plain: PlainTraining | None) -> Measured:
    """Steps after a warm-up; the plain version's between them, each with the noise of ours."""
    device = trainer.session.device
    found = Measured(Clock(device), Clock(device))
    loader = TimedLoader(trainer.parts.batches)
    meter = FlopMeter(trainer.method.parts.networks)
    trainer.parts = replace(trainer.parts, batches=cast(BatchLoader, loader))
    for number in range(rounds.warmup + rounds.timed):
        counts = number >= rounds.warmup
        phases = list(trainer.phases(trainer.state.step))
        with (found.ours if counts else Clock(device))():
            found.losses += take_step(trainer)
        (waited, batches), flops = loader.take(), meter.take()
        if plain is not None:
            with (found.plain if counts else Clock(device))():
                found.plain_losses += plain.step(phases, batches)
        if counts:
            found.data_wait.append(waited)
            found.flops.append(flops)
            found.kinds.append(len(phases))
    trainer.parts = replace(trainer.parts, batches=loader.loader)
    meter.close()
    return found


def held_bytes(trainer: Trainer) -> int:
    """Of weights, averages and the state of optimizers on this rank."""
    tensors: dict[int, Tensor] = {}

    def note(values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, Tensor):
                storage = local(value.detach()).untyped_storage()
                tensors[storage.data_ptr()] = local(value.detach())

    for network in trainer.method.parts.networks.values():
        note(network.parameters())
    note(trainer.ema.shadow.values())
    for role in trainer.roles.values():
        for optimizer in role.optimizers:
            for state in optimizer.state.values():
                note(state.values())
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())


def peak_bytes(trainer: Trainer) -> int | None:
    """The most that a step holds on this device: CUDA's own count, or tensors counted one by one.

    None for networks that FSDP2 has sharded on CPUs: it grows and empties its storages unseen.
    """
    device = trainer.session.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        take_step(trainer)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    networks = trainer.method.parts.networks.values()
    if any(isinstance(network.model, FSDPModule) for network in networks):
        return None
    with LivePeak(held_bytes(trainer)) as live:
        take_step(trainer)
    return live.peak


def save_stall(trainer: Trainer) -> float | None:
    """Seconds for which a step waits while a checkpoint is written; None where no room is."""
    folder = trainer.parts.logdir
    room = shutil.disk_usage(folder).free
    if trainer.session.any(2 * trainer.session.world_size * held_bytes(trainer) > room):
        return None
    clock = Clock(trainer.session.device)
    with clock():
        trainer.save()
    assert trainer.saver is not None, "a benchmark has a log directory"
    trainer.saver.settle(last=True)
    trainer.session.barrier()
    if trainer.session.is_main:
        shutil.rmtree(trainer.checkpoints, ignore_errors=True)
    return clock.wall[0]


def measure(trainer: Trainer, name: str, rounds: Rounds) -> Row:
    """One row of a trainer that has just been built. Collective."""
    session, run = trainer.session, trainer.parts.run
    notes = []
    why = unlike(run, session.world_size) if rounds.plain else None
    if why is not None:
        notes.append(f"no plain version: {why}")
    plain = PlainTraining(trainer) if rounds.plain and why is None else None
    found = time_steps(trainer, rounds, plain)
    del plain
    peak = peak_bytes(trainer)
    if peak is None:
        notes.append("memory is not counted under FSDP2 on CPUs")
    stall = save_stall(trainer) if rounds.save else None
    row = make_row(trainer, name, found)
    row = replace(
        row, peak_gib=None if peak is None else peak / 2**30, save_stall_s=stall, notes=notes
    )
    if session.world_size == 1:
        return row
    counted, formula = measured_traffic(trainer, take_step)
    gathers = run.config.parallel.keep_gathered
    return replace(
        row,
        traffic_gib=counted.total / 2**30,
        traffic_formula_gib=None if gathers else formula.total / 2**30,
    )


def make_row(trainer: Trainer, name: str, found: Measured) -> Row:
    """The row of timed steps."""
    session, run = trainer.session, trainer.parts.run
    config, networks = run.config, trainer.method.parts.networks
    step, place = found.step_s(found.ours.wall), device_name(session.device)
    limit, source = peak_flops(session.device, run.compute)
    counted = all(sizes_of(network) for network in networks.values())
    method = run.method_name if run.causal is None else f"self_forcing_{run.method_name}"
    return Row(
        name=name,
        mode="train",
        method=method,
        device=place,
        ranks=session.world_size,
        dtype=str(run.compute).removeprefix("torch."),
        parameters=sum(p.numel() for p in networks["generator"].parameters()),
        latent_shape=list(run.latent_shape),
        samples=config.batch_size,
        rounds=len(found.ours.wall),
        step_s=step,
        samples_per_s=config.batch_size / step,
        model_tflop=statistics.mean(found.flops) / 1e12 if counted else None,
        mfu=sum(found.flops) / sum(found.ours.wall) / limit if counted else None,
        peak_tflop_s=limit / 1e12,
        peak_source=source,
        data_wait_s=statistics.median(found.data_wait),
        plain_s=found.step_s(found.plain.wall) if found.plain.wall else None,
        plain_ratio=found.ours.ratio(found.plain),
        plain_cpu_ratio=found.ours.cpu_ratio(found.plain),
        plain_difference=found.difference,
    )
