"""The one training loop: phases, accumulation, clipping, averaging, saving and resuming."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from trainer.damage import DamageLog
from trainer.faults import (
    Faults,
    LimitReachedError,
    RunFailedError,
    SkippedUpdate,
    samples_of,
    weights_words,
)
from trainer.hooks import Hook, Moment, run_hooks
from trainer.logdir import CHECKPOINTS
from trainer.parts import TrainerParts
from trainer.phases import Phase, TrainState
from trainer.roles import group_of, parameters_of, prefix_of
from trainer.saving import Saver
from trainer.stopping import Interrupted, StopRequest
from trainer.validation import Validator
from utils import checkpoint
from utils.ema import EMA
from utils.finite import all_finite, marked, not_finite_in
from utils.metrics import Metrics
from utils.parallel import keep_gathered
from utils.progress import Progress
from utils.seeding import step_rng
from utils.stragglers import Clock, tell_stragglers
from utils.watchdog import limited

log = logging.getLogger(__name__)

AGAIN = "run the same command again to continue"


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
        self.clock = Clock()
        self.faults = Faults(self.config.faults, parts.logdir, parts.session)
        self.saver: Saver | None = None
        if parts.claim is not None:
            self.saver = Saver(self.config, parts.claim, parts.session)
        self._progress = Progress("", done=0, total=0, shown=False)
        self._stop = StopRequest()
        self._late = False  # whether a save was put off

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
        done, total = self.state.step, self.config.steps
        name, main = self.parts.logdir.name, self.session.is_main
        self._progress = Progress(name, done=done, total=total, shown=main)
        limit_s = self.config.faults.step_timeout_s
        watched = limited(limit_s, self.parts.logdir, self.session)
        with self._progress, self._stop.listening(), watched as section:
            while self.state.step < self.config.steps:
                step = self.state.step + 1
                try:
                    with section(f"step {step}"):
                        for phase in self.phases(self.state.step):
                            self.optimise(phase)
                    self.state.step = step
                    self.metrics.count_step()
                    self._progress.step()
                    with section(f"what follows step {step}"):
                        self.after_step()
                except LimitReachedError as limit:
                    self.recover(limit)

    def recover(self, limit: LimitReachedError) -> None:
        """Go back to the newest checkpoint that is well, and past the samples since, or raise.

        Collective.
        """
        good = None if self.saver is None else self.saver.newest(limit.well_until)
        if good is None or not self.faults.may_roll_back(limit, checkpoint.step_of(good)):
            raise RunFailedError(self.faults.advice(limit, good)) from limit
        step, draws = self.state.step, self.state.draws
        self.load(good)
        self.state.draws = max(draws, self.state.draws)
        self.metrics.clear()
        self._late = False
        self.faults.rolled_back(limit, step, self.state.step, self.state.draws)
        if self.saver is not None and limit.well_until is not None:
            self.saver.drop_after(self.state.step)
        if self.parts.health is not None:
            self.parts.health.rewind(self.state.step)
        if self.session.is_main:
            log.warning(
                "%s; rolled back to step %d, and on with other samples", limit, self.state.step
            )
            for tracker in self.parts.trackers:
                tracker.rewind(self.state.step)
        self._progress.rewind(self.state.step)

    def optimise(self, phase: Phase) -> None:
        """One phase: micro-batches, then for each of its roles clipping, step, averaging.

        The labels are what a profiler (scripts/benchmark.py) shows.
        """
        with self.only_trainable(phase.roles):
            losses = self.accumulate(phase)
        moved = self.moved(phase)
        norms = {name: self.clip(name) for name in moved}
        if not self.finite(norms):
            self.skip(phase, losses, norms)
            return
        self.faults.made(phase.name)
        self.state.draws = self.draws_after(phase)
        for values in losses:
            self.metrics.add(phase.name, values)
        for name in moved:
            self.metrics.add(name, {"grad_norm": norms[name]})
            self.apply_gradients(name)
            self.method.after_update(name)

    def finite(self, norms: Mapping[str, Tensor]) -> bool:
        """Whether a phase's gradients and losses are, on all ranks: its one wait for the device."""
        with self.clock.measured("wait"):
            return all_finite(norms.values(), self.session.device)

    def skip(
        self, phase: Phase, losses: Sequence[Mapping[str, Tensor]], norms: Mapping[str, Tensor]
    ) -> None:
        """Make no update: a loss or gradient is not finite. Collective.

        Raises LimitReachedError where that has happened too often.
        """
        for name in norms:
            self.roles[name].clear_gradients()
        first, self.state.draws = self.state.draws, self.draws_after(phase)
        parts = [self.micro_batch(part) for part in range(self.config.accumulation)]
        share = self.parts.batches.share(first, parts, [values["loss"] for values in losses])
        skipped = SkippedUpdate(
            step=self.state.step + 1,
            phase=phase.name,
            norms={name: f"{float(norm):.4g}" for name, norm in norms.items()},
            draws=(first, first + self.config.batch_size),
            samples=samples_of(self.session.gather(share)),
        )
        self.faults.skip(skipped, self.unfit())

    def unfit(self) -> list[str]:
        """What of the state is not finite on any rank, by name. Collective."""
        found = self.session.gather(not_finite_in(self.state_dict()))
        return sorted({name for names in found for name in names})

    def moved(self, phase: Phase) -> list[str]:
        """The roles that have gradients of a phase: of two experts those that a loss reached."""
        names = [name for group in phase.roles for name in self.members(group)]
        return [name for name in names if name == group_of(name) or self.roles[name].learnt]

    def members(self, group: str) -> list[str]:
        """The role of this name, or the roles of its experts."""
        return [name for name in self.roles if group_of(name) == group]

    def accumulate(self, phase: Phase) -> list[dict[str, Tensor]]:
        """The gradients of one global batch; returns what each micro-batch reports."""
        micro = self.config.accumulation
        reports = []
        for part in range(micro):
            indices = self.micro_batch(part)
            with record_function("data"):
                with self.clock.measured("data"):
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
                torch.autograd.backward(output.loss / micro, marked(output.loss))
            reports.append({"loss": output.loss.detach(), **output.metrics})
        return reports

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

    def clip(self, name: str) -> Tensor:
        """Clip a role's gradients; returns their norm before that, the same on all ranks."""
        with record_function("clip"):
            return self.roles[name].clip()

    def apply_gradients(self, name: str) -> None:
        """Step the role's optimizers, clear gradients, move the average."""
        role, group = self.roles[name], group_of(name)
        with record_function("optimizer"):
            role.step(self.state.updates_of(group), self.total_updates(group))
        self.state.updates[name] += 1
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
            every = 1 if self._late else config.save_every
            saving = (Hook("save", every, self.save_if_fit, when_stopping=True),)
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

    def save_if_fit(self, moment: Moment) -> None:
        """Save, but while updates are being skipped: what they begin with may be the fault.

        Then the save is made up for as soon as an update has been made, or where the run ends.
        """
        self._late = self.faults.doubtful and not (moment.last or moment.stopping)
        if not self._late:
            self.unhurried(self.save)

    def unhurried(self, task: Callable[..., None], *arguments: Any) -> None:
        """Do what is no part of a step: its time is not counted to `seconds_per_step`."""
        with self.metrics.paused():
            task(*arguments)

    def after_step(self) -> None:
        """Log, save and show samples, each at its own interval; stop if a signal asked for it."""
        skipped = self.parts.batches.take_skipped()
        with self.clock.measured("wait"):
            number, damaged = self.session.most_of(self._stop.number, len(skipped))
        stopping = bool(number)
        if damaged:
            self.damage.share(self.state.step, skipped)
        moment = Moment(self.state.step, self.state.step == self.config.steps, stopping)
        run_hooks(self.hooks(), moment)
        if self.saver is not None and (stopping or moment.last):
            self.saver.settle(last=True)
        if stopping and not moment.last:
            outlook = AGAIN if self.parts.save else "nothing is saved (--no_save)"
            raise Interrupted(f"stopped after step {moment.step}; {outlook}", number)

    def log_metrics(self) -> None:
        """Read the metrics and write them."""
        steps = self.metrics.steps
        values = self.metrics.read() | self.faults.counted()
        times = self.clock.read(values["seconds_per_step"], steps)
        tell_stragglers(self.session, times, self.config.faults.straggler_ratio)
        for name, role in self.roles.items():
            if self.state.updates[name]:
                values[f"{name}/lr"] = role.lr
        values |= self.damage.values()
        if self.session.is_main:
            for tracker in self.parts.trackers:
                tracker.log(self.state.step, values)
        self._progress.tell(values)

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
        state = self.state_dict()
        unfit = self.unfit()
        if unfit:
            raise LimitReachedError(f"step {self.state.step}: {weights_words(unfit)}")
        self.saver.save(self.state.step, state)

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
