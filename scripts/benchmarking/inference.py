"""Clips, timed: the network alone in turns with the plain version, and a request to its frames."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from model.types import Conditioning
from pipeline.generator import VideoGenerator
from pipeline.protocol import sample
from pipeline.request import Request
from scripts.benchmarking import plain
from scripts.benchmarking.meters import Clock, FlopMeter, LivePeak, device_name, peak_flops
from scripts.benchmarking.rows import Row
from scripts.benchmarking.shapes import make_heads_differ
from scripts.benchmarking.training import Rounds
from scripts.benchmarking.yardstick import plain_blocks, plain_network, sizes_of
from trainer.run import Run
from trainer.serving import serve, serving_dtype, serving_place
from utils.seeding import SampleRNG, sample_rng

PROMPT = "a red circle moves right"


def random_generator(run: Run, device: torch.device) -> VideoGenerator:
    """The run's generator with random weights, ready to make clips."""
    network = run.model.random_network(run.config.seed, serving_place(run, device))
    make_heads_differ("generator", network)
    return serve(run, network, device)


def unlike(run: Run, network: nn.Module) -> str | None:
    """Why the plain version does not make what `run`'s generator makes; None = it does."""
    causal = run.causal
    reasons = {
        "it knows Wan's transformer alone": sizes_of(network) is None,
        "it samples in a few steps alone": run.needs.sampler != "few_step",
        "it reads no images": run.reads_images,
        "it has no window and no noise on the past": causal is not None
        and (causal.local_attn_size is not None or causal.context_noise > 0),
        "it makes all blocks alike, and remembers them clean": causal is not None
        and (causal.remember != "clean" or run.sampling.first_sigmas is not None),
    }
    return next((why for why, holds in reasons.items() if holds), None)


@dataclass(eq=False)
class Measured:
    """One figure per timed clip."""

    ours: Clock  # latents alone
    plain: Clock
    first: Clock  # a request to its first decoded frames
    whole: Clock  # to all of them
    flops: list[int] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)  # of latents, relative to the largest


def nothing_measured(device: torch.device) -> Measured:
    """Where a measurement begins."""
    return Measured(Clock(device), Clock(device), Clock(device), Clock(device))


@dataclass(frozen=True, eq=False)
class Clips:
    """One generator's clips, ours and plain."""

    run: Run
    generator: VideoGenerator
    conditioning: Conditioning
    yardstick: plain.Transformer | None

    def noise(self, number: int) -> SampleRNG:
        """Of clip `number`, the same at every call."""
        return sample_rng(0, "benchmark", [number], self.generator.device)

    def ours(self, number: int) -> Tensor:
        """Latents [1, C, F, H, W]."""
        unconditional = self.generator.encoder.unconditional(self.conditioning)
        shape, rng = self.run.latent_shape, self.noise(number)
        return sample(self.generator.pipeline, self.conditioning, unconditional, shape, rng)

    @torch.no_grad()
    def plainly(self, net: plain.Transformer, number: int) -> Tensor:
        """The same by the plain version."""
        shape, rng, text = self.run.latent_shape, self.noise(number), self.conditioning.text
        blocks, levels = plain_blocks(self.run), self.run.sampling.sigmas
        if blocks is None:
            return plain.few_steps(net, rng.randn(shape), levels, text, rng)
        return torch.cat(list(plain.stream(net, text, shape, blocks, levels, rng)), dim=2)

    def stream(self, number: int, found: Measured) -> None:
        """A request to its decoded frames, timed."""
        pieces = self.generator.stream(Request(PROMPT, seed=number))
        with found.whole():
            with found.first():
                next(pieces)
            for _ in pieces:
                pass


def time_clips(clips: Clips, rounds: Rounds) -> Measured:
    """Clips after a warm-up; the plain version's between them, of the same noise."""
    device = clips.generator.device
    found = nothing_measured(device)
    meter = FlopMeter({"generator": clips.generator.network})
    for number in range(rounds.warmup + rounds.timed):
        if number == rounds.warmup:
            found = nothing_measured(device)
        meter.take()
        with found.ours():
            latents = clips.ours(number)
        found.flops.append(meter.take())
        if clips.yardstick is not None:
            with found.plain():
                same = clips.plainly(clips.yardstick, number)
            found.differences.append(float((latents - same).abs().max() / same.abs().max()))
        clips.stream(number, found)
    meter.close()
    return found


def peak_bytes(clips: Clips) -> int:
    """The most that a clip's latents hold on this device, weights included."""
    device, network = clips.generator.device, clips.generator.network
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        clips.ours(0)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    with LivePeak(sum(weight.nbytes for weight in network.parameters())) as live:
        clips.ours(0)
    return live.peak


def measure(run: Run, generator: VideoGenerator, name: str, rounds: Rounds) -> Row:
    """One row of a generator."""
    network, notes = generator.network, []
    why = unlike(run, network) if rounds.plain else None
    if why is not None:
        notes.append(f"no plain version: {why}")
    yardstick = None
    dtype = serving_dtype(run, generator.device)
    if rounds.plain and why is None:
        yardstick = plain_network(network, dtype, recompute=False)
    conditioning = generator.encoder.encode([PROMPT], None, frames=run.latent_shape[1])
    clips = Clips(run, generator, conditioning, yardstick)
    found = time_clips(clips, rounds)
    peak = peak_bytes(Clips(run, generator, conditioning, None))
    counted = sizes_of(network) is not None
    limit, source = peak_flops(generator.device, dtype)
    place, step = device_name(generator.device), statistics.median(found.ours.wall)
    return Row(
        name=name,
        mode="inference",
        method=run.method_name if run.causal is None else f"self_forcing_{run.method_name}",
        device=place,
        ranks=1,
        dtype=str(dtype).removeprefix("torch."),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        latent_shape=list(run.latent_shape),
        samples=1,
        rounds=len(found.ours.wall),
        step_s=step,
        samples_per_s=1.0 / step,
        peak_gib=peak / 2**30,
        model_tflop=statistics.mean(found.flops) / 1e12 if counted else None,
        mfu=sum(found.flops) / sum(found.ours.wall) / limit if counted else None,
        peak_tflop_s=limit / 1e12,
        peak_source=source,
        first_frame_s=statistics.median(found.first.wall),
        fps=run.model.latent.pixel_frames(run.latent_shape[1])
        / statistics.median(found.whole.wall),
        plain_s=statistics.median(found.plain.wall) if found.plain.wall else None,
        plain_ratio=found.ours.ratio(found.plain),
        plain_cpu_ratio=found.ours.cpu_ratio(found.plain),
        plain_difference=max(found.differences) if found.differences else None,
        notes=notes,
    )
