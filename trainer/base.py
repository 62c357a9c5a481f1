"""The one training loop: phases, accumulation, clipping, averaging, saving and resuming."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function
from tqdm import tqdm

from model.base import Method
from model.types import Batch, LossOutput
from trainer.batches import BatchLoader
from trainer.damage import DamageLog
from trainer.health import HealthProbe
from trainer.hooks import Hook, Moment, run_hooks
from trainer.logdir import CHECKPOINTS, Claim
from trainer.roles import Role, group_of, parameters_of, prefix_of
from trainer.run import Run
from trainer.saving import Saver
from trainer.stopping import StopRequest
from trainer.validation import Validator
from utils import checkpoint
from utils.distributed import Session
from utils.ema import EMA
from utils.errors import UserError
from utils.metrics import Metrics, Tracker, not_finite
from utils.parallel import keep_gathered
from utils.seeding import StepRNG, step_rng

log = logging.getLogger(__name__)

AGAIN = "run the same command again to continue"


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop, and it did, after a whole step."""


class RunFailedError(UserError):
    """The run cannot go on, and says why."""


@dataclass(frozen=True)
class Phase:
    """One loss within an outer step, and one update of each role that it moves."""

    name: str  # of its randomness and its metrics
    loss: Callable[[Batch, StepRNG], LossOutput]
    roles: tuple[str, ...]  # whose weights it moves; of two experts, those that it reaches
    hands_on: bool = False  # whether the phase after it is given the same samples of the data


@dataclass
class TrainState:
    """All that a resumed run needs beside weights, averages and optimizer states."""

    step: int = 0  # outer steps done
    draws: int = 0  # samples taken from the data order so far, over all ranks
    updates: dict[str, int] = field(default_factory=dict)  # optimizer updates per role

    def updates_of(self, group: str) -> int:
        """Those of a role, or of both of its experts together."""
        return sum(count for name, count in self.updates.items() if group_of(name) == group)


@dataclass(frozen=True, eq=False)
class TrainerParts:
    """What the composition root hands to a trainer."""

    run: Run
    session: Session
    method: Method
    roles: Mapping[str, Role]
    batches: BatchLoader
    trackers: Sequence[Tracker]
    validator: Validator | None
    logdir: Path
    save: bool  # whether checkpoints are written
    claim: Claim | None = None  # of the log directory; None = nothing is read or written there
    health: HealthProbe | None = None


class Trainer(ABC):
    """Runs phases until `steps` are done. A subclass decides nothing but the phases."""

    def __init__(self, parts: TrainerParts) -> None:
        self.parts = parts
        self.config = parts.run.config
        self.session = parts.session
        self.method = parts.method
        self.roles = parts.roles
        self.ema = EMA(parameters_of(parts.roles, "generator"), self.config.ema)
        self.state = TrainState(updates=dict.fromkeys(parts.roles, 0))
        self.metrics = Metrics(parts.session)
        self.damage = DamageLog(parts.session, parts.logdir, self.config.data.max_damaged)
        self.saver: Saver | None = None
        if parts.claim is not None:
            self.saver = Saver(self.config, parts.claim, parts.session)
        self._bar: tqdm[Any] = tqdm(disable=True)
        self._stop = StopRequest()

    @abstractmethod
    def phases(self, step: int) -> Iterable[Phase]:
        """What to optimise at `step`, in order."""

    @abstractmethod
    def total_updates(self, role: str) -> int:
        """How many updates `role` gets in the whole run, its experts together; schedules end there.

        role: as phases call it.
        """

    @property
    def checkpoints(self) -> Path:
        """Where this run's checkpoints lie."""
        return self.parts.logdir / CHECKPOINTS

    def train(self) -> None:
        """Resume if there is something to resume, then train until `steps`."""
        with ExitStack() as closing:  # what is entered last is closed first
            if self.parts.claim is not None:
                closing.callback(self.parts.claim.release)
            for tracker in self.parts.trackers:
                closing.callback(tracker.close)
            closing.callback(self.parts.batches.close)
            if self.saver is not None:
                closing.callback(self.saver.close)
            self._train()

    def _train(self) -> None:
        self.resume()
        self.damage.resume(self.state.step)
        if self.state.step >= self.config.steps:
            log.info(
                "nothing is left to do: %d steps are done, and steps=%d asks for no more; "
                "raise steps to go on",
                self.state.step,
                self.config.steps,
            )
        self._bar = tqdm(
            total=self.config.steps,
            initial=self.state.step,
            desc=self.parts.logdir.name,
            disable=not self.session.is_main,
            mininterval=1.0,
        )
        with self._bar, self._stop.listening():
            while self.state.step < self.config.steps:
                for phase in self.phases(self.state.step):
                    self.optimise(phase)
                self.state.step += 1
                self.metrics.count_step()
                self._bar.update()
                self.after_step()

    def optimise(self, phase: Phase) -> None:
        """One phase: micro-batches, then for each of its roles clipping, step, averaging.

        The labels are what a profiler (scripts/benchmark.py) shows.
        """
        with self.only_trainable(phase.roles):
            self.accumulate(phase)
        self.state.draws = self.draws_after(phase)
        for name in self.moved(phase):
            self.apply_gradients(name)
            self.method.after_update(name)

    def moved(self, phase: Phase) -> list[str]:
        """The roles that have gradients of a phase: of two experts those that a loss reached."""
        names = [name for group in phase.roles for name in self.members(group)]
        return [name for name in names if name == group_of(name) or self.roles[name].learnt]

    def members(self, group: str) -> list[str]:
        """The role of this name, or the roles of its experts."""
        return [name for name in self.roles if group_of(name) == group]

    def accumulate(self, phase: Phase) -> None:
        """The gradients of one global batch."""
        micro = self.config.accumulation
        for part in range(micro):
            indices = self.micro_batch(part)
            with record_function("data"):
                batch = self.parts.batches(self.state.draws, indices)
                rng = step_rng(
                    self.config.seed,
                    phase.name,
                    step=self.state.step,
                    first=self.state.draws,
                    indices=indices,
                    device=self.session.device,
                )
            self.prefetch(phase, part)
            for name in (name for role in phase.roles for name in self.members(role)):
                self.roles[name].sync_gradients(self.config.parallel, last=part == micro - 1)
            with record_function(f"{phase.name} loss"):
                output = phase.loss(batch, rng)
            with record_function(f"{phase.name} backward"):
                torch.autograd.backward(output.loss / micro)
            self.metrics.add(phase.name, {"loss": output.loss.detach(), **output.metrics})

    def draws_after(self, phase: Phase) -> int:
        """How many samples of the data are taken when `phase` is over."""
        return self.state.draws + (0 if phase.hands_on else self.config.batch_size)

    def prefetch(self, phase: Phase, part: int) -> None:
        """Let the data of the micro-batch after `part` be read while this one is computed."""
        if part + 1 < self.config.accumulation:
            self.parts.batches.prefetch(self.state.draws, self.micro_batch(part + 1))
        else:
            self.parts.batches.prefetch(self.draws_after(phase), self.micro_batch(0))

    @contextmanager
    def only_trainable(self, names: Sequence[str]) -> Iterator[None]:
        """Within the body no other role gathers gradients: losses may pass through its weights."""
        others = [role for name, role in self.roles.items() if group_of(name) not in names]
        for role in others:
            role.requires_grad_(False)
        try:
            yield
        finally:
            for role in others:
                role.requires_grad_(True)

    def apply_gradients(self, name: str) -> None:
        """Clip, step the role's optimizers, clear gradients, move the average."""
        role, group = self.roles[name], group_of(name)
        with record_function("clip"):
            norm = role.clip()
        with record_function("optimizer"):
            role.step(self.state.updates_of(group), self.total_updates(group))
        self.state.updates[name] += 1
        self.metrics.add(name, {"grad_norm": norm})
        if group == "generator":
            with record_function("average"):
                self.ema.update(step=self.state.step, prefix=prefix_of(name))

    def micro_batch(self, part: int) -> list[int]:
        """Positions in the global batch of this rank's samples of micro-batch `part`."""
        size = self.config.batch_size // self.config.accumulation // self.session.data_world
        first = (part * self.session.data_world + self.session.data_rank) * size
        return list(range(first, first + size))

    def hooks(self) -> Iterator[Hook]:
        """What is done after steps, in order: a picture that fails finds the step saved."""
        config, validator = self.config, self.parts.validator
        saving: tuple[Hook, ...] = ()
        if self.parts.save:
            save = Hook(
                "save", config.save_every, lambda _: self.unhurried(self.save), when_stopping=True
            )
            saving = (save,)
        yield Hook("log", config.log_every, lambda _: self.log_metrics(), before=saving)
        yield from saving
        if validator is not None:
            show = partial(self.unhurried, self.show_samples, validator)
            yield Hook("show", config.validation.every, lambda _: show())
        if self.parts.health is not None:
            yield self.parts.health.hook(self)

    def progress(self) -> tuple[int, Mapping[str, int]]:
        """Steps done, and updates by role."""
        return self.state.step, self.state.updates

    def unhurried(self, task: Callable[..., None], *arguments: Any) -> None:
        """Do what is no part of a step: its time is not counted to `seconds_per_step`."""
        with self.metrics.paused():
            task(*arguments)

    def after_step(self) -> None:
        """Log, save and show samples, each at its own interval; stop if a signal asked for it."""
        skipped = self.parts.batches.take_skipped()
        stopping, damaged = self.session.any_of(self._stop.made, bool(skipped))
        if damaged:
            self.damage.share(self.state.step, skipped)
        moment = Moment(self.state.step, self.state.step == self.config.steps, stopping)
        run_hooks(self.hooks(), moment)
        if self.saver is not None and (stopping or moment.last):
            self.saver.settle(last=True)
        if stopping and not moment.last:
            outlook = AGAIN if self.parts.save else "nothing is saved (--no_save)"
            raise Interrupted(f"stopped after step {moment.step}; {outlook}")

    def log_metrics(self) -> None:
        """Read the metrics, the loop's one host sync, and write them. Raises on NaN."""
        values = self.metrics.read()
        for name, role in self.roles.items():
            if self.state.updates[name]:
                values[f"{name}/lr"] = role.lr
        values |= self.damage.values()
        if self.session.is_main:
            for tracker in self.parts.trackers:
                tracker.log(self.state.step, values)
            losses = {k: f"{v:.4g}" for k, v in values.items() if k.endswith("/loss")}
            self._bar.set_postfix(losses, refresh=False)
        bad = not_finite(values)
        if bad:
            if self.saver is not None:
                self.saver.settle()
            good = checkpoint.latest(self.checkpoints)
            raise RunFailedError(
                f"step {self.state.step}: {', '.join(bad)} not finite; the last good checkpoint is "
                f"{good or 'none'}. Lower the learning rate or max_grad_norm and start again."
            )

    def show_samples(self, validator: Validator) -> None:
        """Write pictures of samples made with the averaged weights."""
        generator = self.roles[self.members("generator")[0]].network
        kept = keep_gathered(generator) if self.config.parallel.keep_gathered else nullcontext()
        with self.ema.swapped_in(), kept:
            path = validator.show(generator, self.parts.batches, self.state.step)
        if self.session.is_main:
            for tracker in self.parts.trackers:
                tracker.picture(self.state.step, "samples", path)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "roles": {name: role.weights() for name, role in self.roles.items()},
            "optim": {name: role.optimizer_state() for name, role in self.roles.items()},
            "ema": {"generator": dict(self.ema.shadow)},
            "state": {
                "step": torch.tensor(self.state.step),
                "draws": torch.tensor(self.state.draws),
                "updates": {k: torch.tensor(v) for k, v in self.state.updates.items()},
            },
        }

    def save(self) -> None:
        """Begin to write a checkpoint of this step. Collective."""
        assert self.saver is not None, "a run without a log directory saves nothing"
        self.saver.save(self.state.step, self.state_dict())

    def resume(self) -> None:
        """Continue from the checkpoint that the log directory was claimed with, if there is one."""
        claim = self.parts.claim
        if claim is not None and claim.resume_from is not None:
            self.load(claim.resume_from)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint. Collective."""
        state = self.state_dict()
        checkpoint.load(path, state)
        for name, role in self.roles.items():
            role.load(state["roles"][name], state["optim"][name])
        saved = state["state"]
        updates = {name: int(value) for name, value in saved["updates"].items()}
        self.state = TrainState(int(saved["step"]), int(saved["draws"]), updates)
        log.info("resumed %s", path)
