"""The composition root: from a Config to a Trainer, checks first, weights last."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from model.base import Method, Parts
from model.conditioning import ConditioningEncoder, ImageEncoder
from model.discriminator import Discriminator
from model.encoders.clip import WanCLIPEncoder
from model.encoders.text import WanTextEncoder
from model.encoders.vae import VideoVAE, load_vae
from model.folders.folder import ModelFolder
from model.folders.loading import (
    Placement,
    load_network,
    random_discriminator,
    random_network,
)
from model.types import Denoiser, Rollout
from model.wan_wrapper import WanDiffusionWrapper
from pipeline.build import ROLLOUTS, SAMPLERS, Sampling
from pipeline.protocol import InferencePipeline
from trainer.base import TrainedRole, Trainer, TrainerParts
from trainer.batches import BatchLoader
from trainer.config import (
    Config,
    TrainedNetworkConfig,
    causal_config,
    compute_dtype,
    method_needs,
    optimizer_settings,
    role_settings,
    sigmas,
)
from trainer.inputs import Inputs, check_inputs, claim_logdir, role_weights
from trainer.registry import TRAINERS
from trainer.validation import Validator
from utils import checkpoint
from utils.data.embeddings import EmbeddingReader
from utils.distributed import Session
from utils.metrics import JsonLines, Tracker, WandB
from utils.optim import build_optimizers
from utils.parallel import build_mesh
from utils.seeding import derive_seed

log = logging.getLogger(__name__)

Network = WanDiffusionWrapper | Discriminator


@dataclass(frozen=True)
class RunOptions:
    """What the command line says about a run beside its configuration."""

    logdir: Path
    config_name: str
    save: bool = True
    visualize: bool = True
    wandb: bool = True
    wandb_folder: Path | None = None  # None = the log directory


def build_trainer(config: Config, session: Session, options: RunOptions) -> Trainer:
    """Check everything, claim the log directory, load the networks, wire the trainer.

    Raises ConfigError, FileNotFoundError or ValueError for what its user can mend.
    """
    inputs = check_inputs(config, session)
    claim_logdir(config, session, options.logdir)
    trackers = _build_trackers(config, session, options)
    vae = _build_vae(config, session, options, inputs)
    batches = _build_batches(config, session, inputs, vae)
    networks = _build_networks(config, session, inputs)
    roles = {}
    for name in inputs.needs.trained:
        settings = optimizer_settings(config)[name]
        model = networks[name].model
        optimizers = build_optimizers(model, model.blocks, settings)
        roles[name] = TrainedRole(networks[name], optimizers, settings)
    validator = _build_validator(config, session, options, inputs, vae)
    method = _build_method(config, inputs, networks, vae)
    _announce(config, session, networks)
    parts = TrainerParts(
        config=config,
        session=session,
        method=method,
        roles=roles,
        batches=batches,
        trackers=trackers,
        validator=validator,
        logdir=options.logdir,
        save=options.save,
    )
    trainer: Trainer = TRAINERS[config.trainer].load()(parts)
    return trainer


def _placement(config: Config, session: Session, *, trained: bool) -> Placement:
    compute = compute_dtype(config)
    return Placement(
        device=session.device,
        storage=torch.float32 if trained else compute,
        compute=compute,
        mesh=build_mesh(session, config.sharding_strategy),
    )


def _build_networks(config: Config, session: Session, inputs: Inputs) -> dict[str, Network]:
    networks: dict[str, Network] = {}
    for role in inputs.needs.networks:
        network = _build_network(config, session, inputs, role)
        network.model.checkpoint_blocks = config.parallel.activation_checkpoint == "block"
        networks[role] = network
    if inputs.needs.backbone is not None:
        sizes = inputs.folders[inputs.needs.backbone].wan_config()
        place = _placement(config, session, trained=True)
        networks["discriminator"] = random_discriminator(
            sizes, config.discriminator, config.seed, replace(place, compute=torch.float32)
        )
    return networks


def _build_network(
    config: Config, session: Session, inputs: Inputs, role: str
) -> WanDiffusionWrapper:
    settings = role_settings(config)[role]
    folder = inputs.folders[role]
    trained = role in inputs.needs.trained
    place = _placement(config, session, trained=trained)
    if isinstance(settings, TrainedNetworkConfig) and settings.random_init:
        return random_network(folder.wan_config(), config.seed, place)
    weights = role_weights(config, role, folder)
    network = load_network(folder.wan_config(), weights, place, what=f"{role} {folder.path}")
    return network.requires_grad_(trained)


def _build_vae(
    config: Config, session: Session, options: RunOptions, inputs: Inputs
) -> VideoVAE | None:
    """The autoencoder, if the run decodes or encodes anything."""
    folder, causal = inputs.folders["generator"], config.causal
    wanted = (
        options.visualize and config.validation.every > 0,
        folder.wan_config().sees_images,
        causal.rollout_frames is not None,
        causal.given_first_frame and next(iter(inputs.dataset.buckets)).latents is None,
    )
    return load_vae(folder, session.device, compute_dtype(config)) if any(wanted) else None


def _build_batches(
    config: Config, session: Session, inputs: Inputs, vae: VideoVAE | None
) -> BatchLoader:
    folder, dtype = inputs.folders["generator"], compute_dtype(config)
    encoder = build_encoder(config, folder, session.device, dtype, vae, inputs.embeddings)
    return BatchLoader(config, inputs.dataset, encoder, session.device, vae)


def build_encoder(
    config: Config,
    folder: ModelFolder,
    device: torch.device,
    dtype: torch.dtype,
    vae: VideoVAE | None,
    embeddings: EmbeddingReader | None = None,
) -> ConditioningEncoder:
    """What encodes the prompts, and for an image-to-video model the images, of a model folder.

    vae: needed by image-to-video models. embeddings: prompts that are encoded already; with them
    no text encoder is loaded.
    """
    sizes = folder.wan_config()
    encode: Callable[[list[str]], Tensor] = embeddings or WanTextEncoder(
        folder, sizes.text_len, dtype
    ).to(device)
    images = None
    if sizes.sees_images:
        assert vae is not None, "an image-to-video model needs the VAE"
        images = ImageEncoder(WanCLIPEncoder(folder, dtype).to(device), vae)
    return ConditioningEncoder(
        encode, negative_prompt=config.data.negative_prompt, device=device, images=images
    )


def run_pipeline(config: Config, net: Denoiser) -> InferencePipeline:
    """The pipeline that samples a run's generator."""
    sampling = Sampling(sigmas(config), causal_config(config), config.sampling)
    return SAMPLERS[method_needs(config).sampler](net, sampling)


def _build_validator(
    config: Config,
    session: Session,
    options: RunOptions,
    inputs: Inputs,
    vae: VideoVAE | None,
) -> Validator | None:
    if not options.visualize or not config.validation.every:
        return None
    assert vae is not None, "validation decodes what it samples"
    return Validator(
        items=inputs.shown,
        build_pipeline=lambda net: run_pipeline(config, net),
        vae=vae,
        folder=options.logdir / "samples",
        every=config.validation.every,
        seed=config.seed,
        session=session,
    )


def _build_trackers(config: Config, session: Session, options: RunOptions) -> list[Tracker]:
    if not session.is_main:
        return []
    newest = checkpoint.latest(options.logdir / "checkpoints")
    resumed_at = checkpoint.step_of(newest) if newest else 0
    trackers: list[Tracker] = [JsonLines(options.logdir / "metrics.jsonl", resumed_at=resumed_at)]
    if options.wandb and config.logging.wandb:
        folder = options.wandb_folder or options.logdir
        folder.mkdir(parents=True, exist_ok=True)
        trackers.append(
            WandB(
                project=config.logging.project,
                folder=folder,
                name=f"{options.config_name}-{options.logdir.resolve().name}",
                identity=f"{derive_seed(str(options.logdir.resolve())):016x}",
                config=asdict(config),
            )
        )
    return trackers


def _build_method(
    config: Config,
    inputs: Inputs,
    networks: dict[str, Network],
    vae: VideoVAE | None,
) -> Method:
    parts = Parts(
        networks=networks,
        rollout=_build_rollout(config, inputs, vae),
        sigmas=sigmas(config),
        layout=causal_config(config),
    )
    return inputs.method(config.loss, parts)


def _build_rollout(config: Config, inputs: Inputs, vae: VideoVAE | None) -> Rollout | None:
    needs = inputs.needs
    if needs.rollout is None:
        return None
    sampling = Sampling(sigmas(config), causal_config(config), config.sampling, vae)
    return ROLLOUTS[needs.rollout](sampling, **needs.rollout_options)


def _announce(config: Config, session: Session, networks: dict[str, Network]) -> None:
    if not session.is_main:
        return
    for role, network in networks.items():
        count = sum(p.numel() for p in network.parameters())
        log.info("%s: %.3f M parameters", role, count / 1e6)
    log.info(
        "mesh: %s over %d ranks on %s, %s",
        config.sharding_strategy,
        session.world_size,
        session.device.type,
        "bf16" if config.mixed_precision else "fp32",
    )
    log.info(
        "%d steps of %d samples, %d micro-batches each",
        config.steps,
        config.batch_size,
        config.accumulation,
    )
