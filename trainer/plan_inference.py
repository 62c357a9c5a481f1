"""What a clip takes, told before any weight is read: the real sampler and codec without values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from model.folders.loading import Placement
from trainer.plan import Plan, depths, extended
from trainer.plan_encoders import encoder_bytes
from trainer.plan_trace import BUILD, Trace, World, planned, stand_in_batch
from trainer.run import Run
from utils.dry_run import dry_run
from utils.gpus import GPU
from utils.metering import Meter
from utils.seeding import sample_rng

PHASES = {"denoise": 1, "decode": 1}  # of a batch of clips


def plan_clips(run: Run, gpu: GPU, clips: int) -> Plan:
    """The plan of a batch of `clips` of the run's latent_shape, on one GPU."""
    # A run's own batches and layout belong to its training.
    config = replace(run.config, batch_size=clips, accumulation=1, sharding_strategy="none")
    run = replace(run, config=config)
    short, longer, factor = depths(run)
    world = World(1, 1)
    trace = trace_clips(short, clips)
    deep = None if longer is None else trace_clips(longer, clips)
    encoders = encoder_bytes(run, [*run.model.outlines()])
    plan = extended(run, world, gpu, [trace, trace, deep], factor, encoders)
    return replace(plan, repeats=1)


def trace_clips(run: Run, clips: int) -> Trace:
    """Make a batch of clips without values."""
    device, meter = torch.device("cpu"), Meter()
    with dry_run(on_gpu=True), torch.no_grad():
        with meter, meter.within(BUILD):
            own = planned(run, meter)
            place = Placement(device, storage=run.compute, compute=run.compute)
            network = own.model.random_network(0, place).requires_grad_(False)
            meter.tag(network.parameters(), "generator", "weights")
            batch = stand_in_batch(own, clips)
        meter.watch("generator", network)
        standing = {tag: count for tag, count in meter.live.items() if count}
        for counted in (meter.work, meter.transfers, meter.peaks):
            counted.clear()
        with meter, meter.within("denoise"):
            rng = sample_rng(0, "inference", range(clips), device)
            sampler = own.pipeline(network)
            pieces = sampler.stream(
                batch.conditioning, batch.unconditional, batch.latent_shape, rng
            )
            latents = torch.cat(list(pieces), dim=2)
        decode(own, latents, meter)
    return Trace(standing, dict(meter.peaks), meter.work, meter.transfers, PHASES)


def decode(run: Run, latents: Tensor, meter: Meter) -> None:
    """Latents [B, C, F, H, W] to pixels, one frame of one clip at a time, as when serving."""
    outline = run.model.outlines().get("codec")
    if outline is None:
        return
    codec: Any = outline(run.compute)
    codec.to_empty(device="cpu")  # counted with the other encoders
    with meter, meter.within("decode"):
        for clip in latents.split(1):
            decoder = codec.stream_decoder()
            for frame in clip.split(1, dim=2):
                decoder.decode(frame)


def with_frames(run: Run, frames: int | None) -> Run:
    """The run with clips of so many latent frames; None = of its own."""
    if frames is None:
        return run
    channels, _, height, width = run.latent_shape
    config = replace(run.config, latent_shape=[channels, frames, height, width])
    return replace(run, config=config, latent_shape=(channels, frames, height, width))
