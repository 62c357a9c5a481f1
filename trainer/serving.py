"""From a configuration and a checkpoint to a ready generator: what all serving commands share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.adapters import OnAdapters, install
from model.encoders.idle import Encoders
from model.experts import ExpertPair
from model.families.base import Model
from model.families.registry import check_model
from model.folders.adapter_files import AdapterFile, is_adapter
from model.folders.adapter_words import AdapterWord, Merged, adapter_word, read_adapters
from model.folders.loading import Placement
from model.wan.attention import use_kernel
from pipeline.blocks import CausalConfig
from pipeline.build import ADJUSTABLE
from pipeline.generator import VideoGenerator
from pipeline.memory import Footprint, available_memory
from pipeline.request import Capabilities, Request
from pipeline.teacher import adjusted
from trainer.build import build_encoder
from trainer.config import Config, causal_config
from trainer.decoders import load_vae
from trainer.fusing import served
from trainer.inputs import check_latent_shape
from trainer.run import Run, resolve
from trainer.teams import ALONE, TeamMeshes
from utils.compiling import say_where_graphs_are_kept
from utils.parallel import ParallelConfig
from utils.weights import Weights

# Settings of clips in blocks that are newer than records of clips.
_LATER = ("remember", "sink_decay", "pin")


@dataclass(frozen=True, eq=False)
class Source:
    """What a configuration means, and the checked weights of its generator."""

    run: Run
    weights: Weights  # of the network that adapters are added to, if there are any
    adapters: Sequence[tuple[AdapterWord, AdapterFile]] = ()  # on it, unmerged

    @property
    def model(self) -> Model:
        """The generator's."""
        return self.run.model

    @property
    def files(self) -> list[Path]:
        """Where the weights are, then each adapter: files, folders, training checkpoints."""
        return [self.weights.path, *(adapter.path for _, adapter in self.adapters)]

    def settings(self) -> dict[str, Any]:
        """What tells its weights from others, as JSON has it; no checkpoint moves on from here."""
        adapters = [
            {"path": adapter.path, "strength": word.strength, "expert": word.expert}
            for word, adapter in self.adapters
        ]
        return {"weights": self.weights.path} | ({"adapters": adapters} if adapters else {})


def check_source(
    config: Config,
    checkpoint_path: Path,
    *,
    use_ema: bool | None,
    adapters: Sequence[str] = (),
) -> Source:
    """Find the model folder and the weights, and see that they fit. Of weights nothing is read.

    checkpoint_path: a log directory, a training checkpoint, a weight file or a model folder; or an
    adapter, or a run that trained one, which is added to the generator that the configuration
    names. use_ema: take a training checkpoint's averaged weights; None = if it has some. adapters:
    words of more of them, see `adapter_word`. Raises FileNotFoundError or WeightsError that says
    what is missing or does not fit.
    """
    run = resolve(config, ("generator",))
    check_model(run.model, weights=False)
    check_latent_shape(config.latent_shape, run.model)
    what = f"generator {run.model.path}"
    words = [adapter_word(word) for word in adapters]
    if is_adapter(checkpoint_path):
        below = [adapter_word(word) for word in config.generator.adapters]
        words = [*below, AdapterWord(checkpoint_path, averaged=use_ema), *words]
        weights = run.plain_weights("generator")
    else:
        weights = run.made_weights(checkpoint_path, averaged=use_ema)
    run.model.check_weights(weights, what=what)
    added = read_adapters(words, weights, what=what)
    return Source(run, served(run, weights, [adapter for _, adapter in added]), added)


def capabilities(run: Run, device: torch.device, *, context: int = 1) -> Capabilities:
    """What a run's generator can be asked for on `device`, by so many ranks that share tokens."""
    _, frames, height, width = run.latent_shape
    latent, features, images = run.model.latent, run.model.features, run.model.images
    needed = 0 if images is None or not images.required else images.count
    sampling = run.sampling.many_step if run.needs.sampler in ADJUSTABLE else None
    number_bytes = serving_dtype(run, device).itemsize
    return Capabilities(
        latent=latent,
        size=latent.pixel_size(height, width),
        frames=latent.pixel_frames(frames),
        steps=len(run.few_steps) if sampling is None else sampling.steps,
        sampling=sampling,
        layout=run.causal,
        images=needed,
        first_frame=run.takes_given,
        footprint=Footprint(
            features.width, features.layers, number_bytes, available_memory(device), context
        ),
    )


def load_generator(
    source: Source,
    device: torch.device,
    team: TeamMeshes = ALONE,
    *,
    tiny_vae: Path | None = None,
) -> VideoGenerator:
    """Load what `check_source` found, for inference.

    team: with whom this rank makes clips. tiny_vae: the file of what decodes in the place of the
    model's codec.
    """
    run, what = source.run, f"generator {source.run.model.path}"
    run.check_kernel(device, serving_dtype(run, device), grad=False)
    place = serving_place(run, device, team)
    whole = [replace(adapter, factors={}) for _, adapter in source.adapters if adapter.diffs]
    weights = Merged(source.weights, whole) if whole else source.weights
    turns = run.config.parallel.offload_idle_expert and run.model.experts is not None
    if turns:
        place = replace(place, device=torch.device("cpu"))
    network = run.model.load_network(weights, place, what=what)
    run.divide(network)
    denoiser = with_adapters(network, source)
    if turns:
        assert isinstance(network, ExpertPair), "a model of two experts is loaded as a pair"
        network.requires_grad_(False)
        network.take_turns(device)
    return serve(run, denoiser, device, team, tiny_vae=tiny_vae)


def with_adapters(network: nn.Module, source: Source) -> nn.Module:
    """A Denoiser: `network` with the low-rank parts of a source's adapters on. In place."""
    names = tuple(f"served{number}" for number, _ in enumerate(source.adapters))
    for name, (word, adapter) in zip(names, source.adapters, strict=True):
        model = network.get_submodule("model")
        install(model, name, adapter.factors, what=f"adapter {word.path}")
    return OnAdapters(network, names) if names else network


def serving_place(run: Run, device: torch.device, team: TeamMeshes = ALONE) -> Placement:
    """Where and how a generator lies that makes clips."""
    dtype = serving_dtype(run, device)
    parallel = ParallelConfig(compile=run.config.parallel.compile)
    if parallel.compile:
        say_where_graphs_are_kept()
    return Placement(device, storage=dtype, compute=dtype, parallel=parallel, context=team.context)


def serve(
    run: Run,
    network: nn.Module,
    device: torch.device,
    team: TeamMeshes = ALONE,
    *,
    tiny_vae: Path | None = None,
) -> VideoGenerator:
    """What makes clips with a run's `network`, which lies as `serving_place` says."""
    dtype = serving_dtype(run, device)
    network.requires_grad_(False)
    use_kernel(network, run.kernel("generator", device, dtype, grad=False))
    vae = load_vae(run.model, device, dtype, tiny_vae)
    return VideoGenerator(
        network=network,
        pipeline=run.pipeline(team.denoiser(network)),
        encoder=build_encoder(run, Encoders(device), dtype, vae),
        vae=vae,
        capabilities=capabilities(run, device, context=team.tokens_shared),
        device=device,
    )


def sampling_settings(config: Config, model: Capabilities, shared: Request) -> dict[str, Any]:
    """What of a configuration decides how clips are sampled, as `shared` changes it."""
    wanted: dict[str, Any] = {}
    if model.sampling is not None:
        wanted["sampling"] = asdict(adjusted(model.sampling, shared.steps, shared.cfg_scale))
    else:  # a few steps without a solver or guidance
        wanted["denoising_step_list"] = config.denoising_step_list
        if config.first_block_step_list is not None:
            wanted["first_block_step_list"] = config.first_block_step_list
        wanted["timestep_shift"] = config.timestep_shift
        if config.sampling.boundary is not None:  # between two experts
            wanted["boundary"] = config.sampling.boundary
    causal = causal_config(config)
    if causal is not None and shared.frames is not None:
        causal = replace(causal, rollout_frames=None)  # of training; a clip may be longer
    wanted["causal"] = None if causal is None else _told(causal)
    return wanted


def _told(causal: CausalConfig) -> dict[str, Any]:
    """Its settings; without those that came later, where clips are made as before them."""
    usual, told = CausalConfig(), asdict(causal)
    return {k: v for k, v in told.items() if k not in _LATER or v != getattr(usual, k)}


def serving_dtype(run: Run, device: torch.device) -> torch.dtype:
    """What a generator computes in."""
    return run.compute if device.type == "cuda" else torch.float32
