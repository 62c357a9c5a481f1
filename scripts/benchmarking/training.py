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

from model.types import Batch, LossOutput
from scripts.benchmarking.meters import FlopMeter, LivePeak, device_name, peak_flops, timed
from scripts.benchmarking.rows import Row, predicted
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
    """One figure per timed step."""

    kinds: list[int] = field(default_factory=list)  # how many phases it had
    seconds: list[float] = field(default_factory=list)
    data_wait: list[float] = field(default_factory=list)
    flops: list[int] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    plain_losses: list[Tensor] = field(default_factory=list)

    def step_s(self, seconds: Sequence[float]) -> float:
        """The mean over kinds of steps, as often as they come, of each kind's median."""
        kinds = set(self.kinds)
        of = {
            k: [s for s, kind in zip(seconds, self.kinds, strict=True) if kind == k] for k in kinds
        }
        return sum(len(of[k]) * statistics.median(of[k]) for k in kinds) / len(seconds)

    @property
    def ratio(self) -> float | None:
        """The median of ours / plain; each round has the same exit steps on both sides."""
        if not self.plain:
            return None
        return statistics.median(a / b for a, b in zip(self.seconds, self.plain, strict=True))

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
    """Steps after a warm-up; the plain version's between them, each with ours' noise."""
    found, device = Measured(), trainer.session.device
    loader = TimedLoader(trainer.parts.batches)
    meter = FlopMeter(trainer.method.parts.networks)
    trainer.parts = replace(trainer.parts, batches=cast(BatchLoader, loader))
    for number in range(rounds.warmup + rounds.timed):
        if number == rounds.warmup:
            found.seconds.clear()
            found.plain.clear()
        phases = list(trainer.phases(trainer.state.step))
        with timed(found.seconds, device):
            losses = take_step(trainer)
        (waited, batches), flops = loader.take(), meter.take()
        found.losses += losses
        if plain is not None:
            with timed(found.plain, device):
                found.plain_losses += plain.step(phases, batches)
        if number >= rounds.warmup:
            found.data_wait.append(waited)
            found.flops.append(flops)
            found.kinds.append(len(phases))
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

    None for several ranks on CPUs: FSDP2 grows and empties its storages unseen.
    """
    device = trainer.session.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        take_step(trainer)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    if trainer.session.world_size > 1:
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
    seconds: list[float] = []
    with timed(seconds, trainer.session.device):
        trainer.save()
    shutil.rmtree(trainer.checkpoints, ignore_errors=True)
    return seconds[0]


def measure(trainer: Trainer, name: str, rounds: Rounds) -> Row:
    """One row of a trainer that has just been built."""
    session, run = trainer.session, trainer.parts.run
    notes = []
    why = unlike(run, session.world_size) if rounds.plain else "not asked for"
    plain = PlainTraining(trainer) if why is None else None
    if why is not None and rounds.plain:
        notes.append(f"no plain version: {why}")
    found = time_steps(trainer, rounds, plain)
    del plain
    peak = peak_bytes(trainer)
    if peak is None:
        notes.append("memory is counted for one rank or on CUDA")
    stall = save_stall(trainer) if rounds.save else None
    counted = all(sizes_of(n) for n in run_networks(trainer))
    return make_row(trainer, name, found, peak, stall, counted=counted, notes=notes)


def run_networks(trainer: Trainer) -> list[Any]:
    """The networks that a step calls."""
    return list(trainer.method.parts.networks.values())


def make_row(
    trainer: Trainer,
    name: str,
    found: Measured,
    peak: int | None,
    stall: float | None,
    *,
    counted: bool,
    notes: Sequence[str],
) -> Row:
    """What was measured, as a row."""
    session, run = trainer.session, trainer.parts.run
    step, device = found.step_s(found.seconds), session.device
    limit, source = peak_flops(device, run.compute)
    generator = run_networks(trainer)[0]
    config = run.config
    place = device_name(device)
    return Row(
        name=name,
        mode="train",
        method=run.method_name if run.causal is None else f"self_forcing_{run.method_name}",
        device=place,
        ranks=session.world_size,
        dtype=str(run.compute).removeprefix("torch."),
        parameters=sum(parameter.numel() for parameter in generator.parameters()),
        latent_shape=list(run.latent_shape),
        samples=config.batch_size,
        rounds=len(found.seconds),
        step_s=step,
        samples_per_s=config.batch_size / step,
        peak_gib=None if peak is None else peak / 2**30,
        model_tflop=statistics.mean(found.flops) / 1e12 if counted else None,
        mfu=sum(found.flops) / sum(found.seconds) / limit if counted else None,
        peak_tflop_s=limit / 1e12,
        peak_source=source,
        data_wait_s=statistics.median(found.data_wait),
        save_stall_s=stall,
        plain_s=found.step_s(found.plain) if found.plain else None,
        plain_ratio=found.ratio,
        plain_difference=found.difference,
        prediction=predicted(config, serving=False, device=place, ranks=session.world_size),
        notes=notes,
    )
