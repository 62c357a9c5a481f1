"""Health: the averaged weights, sampled at an interval on fixed prompts and noise, and measured.

A probe observes: it moves no weight, draws from no stream of the training and adds nothing to
metrics.jsonl. See docs/health.md.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.base import Method
from model.encoders.vae import VideoVAE
from model.matching import DistributionMatching
from model.types import Denoiser
from pipeline.build import SAMPLERS, Sampling
from pipeline.protocol import InferencePipeline, sample
from trainer.batches import BatchLoader
from trainer.faults import SpoiltError
from trainer.health_networks import Chunk, Marks, critic_error, look
from trainer.hooks import Hook
from trainer.roles import Role
from trainer.run import Run
from utils.data.dataset import RawItem
from utils.distributed import Session
from utils.ema import EMA
from utils.files import replaced_atomically, write_text
from utils.health.alarms import well_until
from utils.health.figures import distance, measure
from utils.health.log import REFERENCE, Entry, HealthLog, finite
from utils.media.preview import save_preview
from utils.media.video import to_unit
from utils.metrics import JsonLines, Tracker, read_metrics
from utils.parallel import keep_gathered
from utils.seeding import sample_rng

log = logging.getLogger(__name__)

FOLDER = "health"  # of the log directory: clips, and what later probes compare with
LATENTS = "latents"  # the name of the tensor in files of samples


class Watched(Protocol):
    """What a probe reads of a trainer."""

    @property
    def ema(self) -> EMA:
        """The averaged weights."""

    @property
    def method(self) -> Method:
        """The method."""

    @property
    def roles(self) -> Mapping[str, Role]:
        """What is trained."""

    def progress(self) -> tuple[int, Mapping[str, int]]:
        """Steps done, and updates by role."""

    def members(self, group: str) -> list[str]:
        """The role of this name, or those of its experts."""

    def total_updates(self, role: str) -> int:
        """How many updates `role` gets in the whole run."""

    def unhurried(self, task: Callable[..., None], *arguments: Any) -> None:
        """Do what is no part of a step."""


@dataclass(frozen=True, eq=False)
class ProbeParts:
    """What the composition root hands to a probe."""

    run: Run
    session: Session
    networks: Mapping[str, nn.Module]  # by role
    items: Sequence[RawItem]  # one per prompt
    batches: BatchLoader
    trackers: Sequence[Tracker]
    vae: VideoVAE | None  # None = latents are measured, and no clip is shown
    logdir: Path
    resumed_at: int  # the step that the run goes on from


class HealthProbe:
    """Samples, measures, judges and writes; every rank samples the same clips."""

    def __init__(self, parts: ProbeParts) -> None:
        self.parts = parts
        self.run, self.session = parts.run, parts.session
        self.config = parts.run.config.health
        self.folder = parts.logdir / FOLDER
        self._log: HealthLog | None = None
        self._last: Entry | None = None  # the newest line of that
        if self.session.is_main:
            at, patience = parts.resumed_at, self.config.patience
            self._log = HealthLog(parts.logdir, resumed_at=at, patience=patience)
        self._chunks: list[Chunk] | None = None
        self._teacher: Tensor | None = None  # its samples [N, C, F, H, W]
        self._reference: dict[str, float | None] = {}
        self._before: Tensor | None = None  # those of the student at the last probe
        self._marks = Marks(parts.session)

    def hook(self, trainer: Watched) -> Hook:
        """What the loop calls."""
        call = self.probe
        return Hook("probe", self.config.every, lambda _: trainer.unhurried(call, trainer))

    def probe(self, trainer: Watched) -> None:
        """One probe of the trainer as it is. Collective."""
        step, updates = trainer.progress()
        first = self._chunks is None
        chunks = self._begin() if self._chunks is None else self._chunks
        generator = self.parts.networks["generator"]
        with trainer.ema.swapped_in(), self._gathered(generator):
            latents = self._sample(self.run.pipeline(_denoiser(generator)), chunks)
        totals = {name.partition(".")[0]: 0 for name in trainer.roles}
        totals = {name: trainer.total_updates(name) for name in totals}
        figures = self._marks.moved(trainer.roles, updates, totals)
        figures |= self._asked_of_networks(trainer.method, chunks, latents)
        before = self._before
        if before is not None:
            scale = math.sqrt(2.0) * float(latents.std())
            figures["sample_change"] = distance(latents, before) / max(scale, 1e-12)
        self._before = latents
        self.session.on_main(lambda: self._write(step, latents, figures, first=first))
        if self.config.roll_back:
            self._refuse_spoilt()

    def rewind(self, step: int) -> None:
        """Forget the probes of later steps: the run goes on from `step`. Collective."""
        log_ = self._log
        if log_ is not None:
            log_.rewind(step)
        self._before = None

    def _refuse_spoilt(self) -> None:
        """Raise SpoiltError on all ranks if an alarm rose that spoils what was learnt since."""
        told = json.loads(self.session.from_main(json.dumps(self._spoilt())))
        if told is not None:
            raise SpoiltError(*told)

    def _spoilt(self) -> tuple[str, int] | None:
        """What to say, and the step of the last probe that was well; the main rank knows."""
        if self._log is None or self._last is None:
            return None
        verdict = self._last.verdict
        step = well_until(self._log.probes, verdict, self.config.patience)
        if step is None:
            return None
        rose = [alarm for alarm in verdict.alarms if alarm.name in verdict.rose]
        words = "; ".join(f"{alarm.name}: {alarm.seen}. {alarm.advice}" for alarm in rose)
        return f"step {self._last.probe.step}: {words}", step

    def _begin(self) -> list[Chunk]:
        """Encode the prompts, and make the teacher's samples or find them again."""
        self._chunks = list(self._encoded())
        self._before = self._kept("student", self._earlier)
        teacher = self.parts.networks.get("teacher")
        if teacher is not None and self._whole:
            settings = self._teacher_key()
            self._teacher = self._kept("teacher", lambda said: said == settings)
            if self._teacher is None:
                log.info("health: sampling the teacher once, %d clips", self._count)
                with self._gathered(teacher):
                    self._teacher = self._sample(self._teacher_pipeline(teacher), self._chunks)
                made = self._teacher
                self.session.on_main(lambda: self._keep("teacher", made, settings))
            self.session.on_main(self._measure_teacher)
        return self._chunks

    @property
    def _count(self) -> int:
        return len(self.parts.items) * self.config.seeds

    @property
    def _whole(self) -> bool:
        """Whether samples are whole: of one expert alone they end where the other begins."""
        return self.run.gate is None or self.run.model.experts is not None

    def _encoded(self) -> Iterator[Chunk]:
        """The probe's clips in batches as large as a micro-batch of the training."""
        config, run = self.run.config, self.run
        size = max(1, config.batch_size // config.accumulation // self.session.data_world)
        given = run.given_share > 0.0 and config.health.prompts is None
        for first in range(0, self._count, size):
            indices = range(first, min(first + size, self._count))
            items = [self.parts.items[i // self.config.seeds] for i in indices]
            yield Chunk(self.parts.batches.batch(items, given=given), indices)

    @contextmanager
    def _gathered(self, network: nn.Module) -> Iterator[None]:
        kept = self.run.config.parallel.keep_gathered
        with keep_gathered(network) if kept else nullcontext():
            yield

    def _sample(self, pipeline: InferencePipeline, chunks: Sequence[Chunk]) -> Tensor:
        """Latents [N, C, F, H, W] of all clips; a clip's noise is the same whoever makes it."""
        seed, device = self.run.config.seed, self.session.device
        made = []
        for chunk in chunks:
            batch = chunk.batch
            rng = sample_rng(seed, "health", chunk.indices, device)
            made.append(
                sample(
                    pipeline,
                    batch.conditioning,
                    batch.unconditional,
                    batch.latent_shape,
                    rng,
                    initial=batch.given,
                )
            )
        return torch.cat(made)

    def _teacher_pipeline(self, teacher: nn.Module) -> InferencePipeline:
        """Many steps with guidance, over whole clips as losses ask the teacher."""
        many_step = self.run.config.sampling
        return SAMPLERS["many_step"](_denoiser(teacher), Sampling(many_step=many_step))

    def _asked_of_networks(
        self, method: Method, chunks: Sequence[Chunk], latents: Tensor
    ) -> dict[str, float]:
        """What teacher and critic say, of methods that have both."""
        if not isinstance(method, DistributionMatching) or not self._whole:
            return {}
        seed = self.run.config.seed
        with self._gathered(self.parts.networks["critic"]):
            figures = look(method, chunks, latents, seed)
            if self._before is not None:
                replayed = critic_error(method, chunks, self._before.to(latents.device), seed)
                figures["critic_replayed"] = replayed
                figures["critic_lag"] = figures["critic_fresh"] / max(replayed, 1e-12)
        return figures

    # ---- the main rank's part

    def _view(self, latents: Tensor) -> Tensor:
        """What is measured of latents: their pixels in [0, 1], or without a codec themselves."""
        vae = self.parts.vae
        if vae is None:
            return latents.cpu()
        return torch.cat([to_unit(vae.decode_to_pixel(row[None])).cpu() for row in latents])

    def _measure(self, view: Tensor) -> dict[str, float]:
        return measure(view, self.config.seeds, pixels=self.parts.vae is not None)

    def _measure_teacher(self) -> None:
        """Keep what the teacher's clips measure, and show them."""
        assert self._teacher is not None
        view = self._view(self._teacher)
        self._reference = finite(self._measure(view))
        content = {
            "figures": self._reference,
            "prompts": [item.prompt for item in self.parts.items],
        }
        write_text(self.parts.logdir / REFERENCE, json.dumps(content, indent=1))
        self._show(view, "teacher")

    def _write(self, step: int, latents: Tensor, figures: dict[str, float], *, first: bool) -> None:
        """Measure the samples, judge, and tell everyone."""
        assert self._log is not None
        view = self._view(latents)
        figures = {**self._measure(view), **figures, **self._grad_norms(step)}
        if self._teacher is not None:
            theirs = self._view(self._teacher)
            scale = math.sqrt(2.0) * float(theirs.std())
            figures["distance_teacher"] = distance(view, theirs) / max(scale, 1e-12)
        entry = self._last = self._log.add(step, figures, self._reference)
        if first and not self._reference:
            log.info("health: no teacher to compare with; only what needs none raises alarms")
        self._keep("student", latents, {"step": str(step)})
        self._show(view, f"step_{step:06d}")
        self._tell(entry)

    def _tell(self, entry: Entry) -> None:
        """Log alarms at their rise and fall, and hand figures to trackers."""
        verdict, step = entry.verdict, entry.probe.step
        for alarm in verdict.alarms:
            if alarm.name in verdict.rose:
                log.warning("step %d: ALARM %s: %s. %s", step, alarm.name, alarm.seen, alarm.advice)
        for name in verdict.fell:
            log.warning("step %d: the alarm %s is over", step, name)
        values = {k: v for k, v in entry.probe.figures.items() if v is not None}
        values["alarms"] = float(len(verdict.alarms))
        if entry.score is not None:
            values["score"] = entry.score
        for tracker in self.parts.trackers:
            if not isinstance(tracker, JsonLines):  # health.jsonl has them
                tracker.log(step, {f"health/{name}": value for name, value in values.items()})

    def _grad_norms(self, step: int) -> dict[str, float]:
        """Mean norms of gradients that were logged since the last probe, by role."""
        path = self.parts.logdir / "metrics.jsonl"
        if not path.is_file():
            return {}
        since = self._log.probes[-1].step if self._log and self._log.probes else 0
        rows = [row for row in read_metrics(path) if since < row.get("step", 0) <= step]
        names = {name for row in rows for name in row if name.endswith("/grad_norm")}
        return {
            f"{name.partition('/')[0]}_grad_norm": sum(found) / len(found)
            for name in sorted(names)
            if (found := [row[name] for row in rows if name in row])
        }

    def _show(self, view: Tensor, name: str) -> None:
        """A small video per prompt, its seeds side by side: <folder>/<name>/<prompt>.mp4."""
        if self.parts.vae is None:
            return
        prompts = [item.prompt for item in self.parts.items]
        write_text(self.folder / "prompts.json", json.dumps(prompts, indent=1))
        seeds, fps = self.config.seeds, self.run.model.fps
        for number in range(len(self.parts.items)):
            clips = view[number * seeds : (number + 1) * seeds]
            save_preview(clips, self.folder / name / f"{number}.mp4", fps=fps)

    # ---- samples that later probes compare with

    def _teacher_key(self) -> dict[str, str]:
        """What the teacher's samples depend on, as a hash."""
        config, model = self.run.config, self.run.models["teacher"]
        settings = {
            "seed": config.seed,
            "shape": list(self.run.latent_shape),
            "sampling": asdict(config.sampling),
            "seeds": config.health.seeds,
            "prompts": [item.prompt for item in self.parts.items],
            "teacher": str(model.path),
            "weights": asdict(config.teacher),
        }
        text = json.dumps(settings, sort_keys=True)
        return {"settings": hashlib.sha256(text.encode()).hexdigest()}

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _keep(self, name: str, latents: Tensor, told: Mapping[str, str]) -> None:
        with replaced_atomically(self._path(name)) as part:
            save_file({LATENTS: latents.float().cpu().contiguous()}, part, dict(told))

    def _earlier(self, said: Mapping[str, str]) -> bool:
        """Whether a file of the student's samples is of a step that this run comes after."""
        return int(said.get("step", "0")) <= self.parts.resumed_at

    def _kept(self, name: str, fits: Callable[[Mapping[str, str]], bool]) -> Tensor | None:
        """Samples of an earlier start, if every rank can read them and they fit. Collective."""
        found: Tensor | None = None
        try:
            found = read_samples(self._path(name), fits)
        except (OSError, SafetensorError):
            log.info("health: %s: damaged; made anew", self._path(name))
        wanted = (self._count, *self.run.latent_shape)
        if self.session.any(found is None or found.shape != wanted):
            return None
        assert found is not None
        return found.to(self.session.device)


def read_samples(path: Path, fits: Callable[[Mapping[str, str]], bool]) -> Tensor | None:
    """Latents of a file, if it is there and what it says of itself fits."""
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        said = file.metadata() or {}
    return load_file(path)[LATENTS] if fits(said) else None


def _denoiser(network: nn.Module) -> Denoiser:
    found: Denoiser = network
    return found
