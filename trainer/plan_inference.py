"""What a clip takes, told before any weight is read: the real sampler and codec without values."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from model.adapters import OnAdapters
from model.encoders.tiny_vae import TinyVAE
from model.experts import ExpertPair
from model.folders.loading import Placement
from trainer.bases import Base
from trainer.config import Config
from trainer.plan import Plan, depths, extended
from trainer.plan_encoders import encoder_bytes
from trainer.plan_trace import BUILD, Trace, World, host_memory, planned, stand_in_batch
from trainer.run import Run
from utils.dry_run import dry_run
from utils.gpus import GPU
from utils.metering import Meter, Tag
from utils.seeding import sample_rng

PHASES = {"denoise": 1, "decode": 1}  # of a batch of clips


def plan_clips(run: Run, gpu: GPU, clips: int, *, preview: bool = False) -> Plan:
    """The plan of a batch of `clips` of the run's latent_shape, on one GPU.

    preview: the tiny autoencoder decodes them.
    """
    # A run's own batches and layout belong to its training.
    own = replace(run.config.parallel, offload_encoders=False, context=1)
    config = replace(
        run.config, batch_size=clips, accumulation=1, sharding_strategy="none", parallel=own
    )
    run = replace(run, config=config)
    short, longer, factor = depths(run)
    world = World(1, 1)
    codec = TinyVAE.outline(run.model.latent).to(run.compute) if preview else full_codec(run)
    trace = trace_clips(short, clips, codec)
    deep = None if longer is None else trace_clips(longer, clips, codec)
    encoders = encoder_bytes(run, clip_parts(run, preview=preview))
    if preview and codec is not None:
        encoders[Tag("tiny_vae", "encoders")] = float(sum(p.nbytes for p in codec.parameters()))
    plan = extended(run, world, gpu, [trace, trace, deep], factor, encoders)
    return replace(plan, repeats=1)


def full_codec(run: Run) -> nn.Module | None:
    """The model's codec on the meta device; None = it cannot be told."""
    outline = run.model.outlines().get("codec")
    return None if outline is None else outline(run.compute)


def clip_parts(run: Run, *, preview: bool) -> list[str]:
    """Which of a model's parts are there while it makes clips."""
    # For a preview the model's own codec is there only if clips begin with images.
    needless = preview and run.model.images is None
    return [part for part in run.model.outlines() if not (needless and part == "codec")]


def trace_clips(run: Run, clips: int, codec: nn.Module | None) -> Trace:
    """Make a batch of clips without values; `codec`: on the meta device, None = none decodes."""
    device, meter = torch.device("cpu"), Meter()
    with dry_run(on_gpu=True), host_memory(meter), torch.no_grad():
        with meter, meter.within(BUILD):
            own = planned(run, meter)
            network = served_network(own, device)
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
        if codec is not None:
            decode(codec, latents, meter)
    return Trace(standing, dict(meter.peaks), meter.work, meter.transfers, PHASES)


def served_network(run: Run, device: torch.device) -> nn.Module:
    """The generator as it makes clips, with its adapters on."""
    base = Base(run, ("generator",))
    place = Placement(device, storage=run.compute, compute=run.compute, adapters=base.ranks())
    network = run.model.random_network(0, place)
    run.divide(network)
    network.requires_grad_(False)
    if run.config.parallel.offload_idle_expert and run.model.experts is not None:
        assert isinstance(network, ExpertPair), "experts that take turns are a pair"
        network.take_turns(device)
    names = base.names("generator")
    return OnAdapters(network, names) if names else network


def with_adapters(config: Config, words: Sequence[str]) -> Config:
    """The configuration with more adapters on the generator, as a command line names them."""
    below = [*config.generator.adapters, *words]
    return replace(config, generator=replace(config.generator, adapters=below))


def decode(outline: nn.Module, latents: Tensor, meter: Meter) -> None:
    """Latents [B, C, F, H, W] to pixels, one frame of one clip at a time, as when serving."""
    codec: Any = copy.deepcopy(outline).to_empty(device="cpu")  # counted with the other encoders
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
