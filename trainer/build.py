"""The composition root: from a Config to a Trainer, checks first, weights last."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf

from model.base import DistributionMatching, Method
from model.conditioning import ConditioningEncoder
from model.diffusion import Diffusion, DiffusionConfig
from model.flow import step_sigmas
from model.folder import ModelFolder, check_model, find_model
from model.loading import (
    Placement,
    check_weights,
    find_weights,
    load_network,
    random_network,
)
from model.types import Denoiser
from model.wan_wrapper import WanDiffusionWrapper, WanTextEncoder, load_vae
from pipeline.bidirectional import BidirectionalTrainingPipeline
from pipeline.build import inference_pipeline
from pipeline.protocol import InferencePipeline
from trainer.base import TrainedRole, Trainer, TrainerParts
from trainer.config import (
    CHANGEABLE,
    Config,
    TrainedNetworkConfig,
    method_class,
    role_model,
    role_settings,
    trained_networks,
)
from trainer.diffusion import DiffusionTrainer
from trainer.distillation import ScoreDistillationTrainer
from trainer.validation import Validator
from utils import checkpoint
from utils.config import ConfigError, differences, to_yaml
from utils.dataset import Dataset, open_dataset, read_prompt_file
from utils.distributed import Session
from utils.files import write_text
from utils.metrics import JsonLines, Tracker, WandB
from utils.optim import build_optimizers
from utils.parallel import build_mesh
from utils.seeding import derive_seed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOptions:
    """What the command line says about a run beside its configuration."""

    logdir: Path
    config_name: str
    save: bool = True
    visualize: bool = True
    wandb: bool = True
    wandb_folder: Path | None = None  # None = the log directory


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the checks found: folders, data and the method, all before any weight is loaded."""

    folders: dict[str, ModelFolder]  # per role
    dataset: Dataset
    prompts: list[str]  # for validation
    method: type[Method]


def build_trainer(config: Config, session: Session, options: RunOptions) -> Trainer:
    """Check everything, claim the log directory, load the networks, wire the trainer.

    Raises ConfigError, FileNotFoundError or ValueError for what its user can mend.
    """
    inputs = check_inputs(config, session)
    claim_logdir(config, session, options.logdir)
    trackers = _build_trackers(config, session, options)
    encoder = _build_encoder(config, session, inputs.folders["generator"])
    networks = {role: _build_network(config, session, inputs, role) for role in inputs.method.roles}
    roles = {}
    for name in inputs.method.trainable:
        settings = trained_networks(config)[name]
        model = networks[name].model
        model.checkpoint_blocks = config.parallel.activation_checkpoint == "block"
        roles[name] = TrainedRole(
            networks[name], build_optimizers(model, model.blocks, settings), settings
        )
    validator = _build_validator(config, session, options, inputs) if options.visualize else None
    parts = TrainerParts(
        config=config,
        session=session,
        roles=roles,
        dataset=inputs.dataset,
        encoder=encoder,
        trackers=trackers,
        validator=validator,
        logdir=options.logdir,
        save=options.save,
    )
    _announce(config, session, networks)
    return _build_method_trainer(config, inputs.method, networks, parts)


def check_inputs(config: Config, session: Session) -> Inputs:
    """Look at every file and number that the run depends on; nothing heavy is read."""
    method = method_class(config)
    share = config.accumulation * session.world_size
    if config.batch_size % share:
        raise ConfigError(
            f"batch_size: {config.batch_size} samples do not divide over {session.world_size} "
            f"ranks x {config.accumulation} micro-batches; use a multiple of {share}"
        )
    root = Path(config.model_root)
    folders = {role: find_model(root, role_model(config, role)) for role in method.roles}
    for role, folder in folders.items():
        settings = role_settings(config)[role]
        fresh = isinstance(settings, TrainedNetworkConfig) and settings.random_init
        own = fresh or settings.weights is not None
        check_model(folder, weights=not own, encoders=role == "generator")
        if not fresh:
            weights = find_weights(Path(settings.weights) if settings.weights else folder.path)
            check_weights(folder.wan_config(), weights, what=f"{role} {folder.path}")
    dataset = open_dataset(Path(config.data.path))
    shape = tuple(config.latent_shape)
    if method.needs_latents and dataset.latent_shape is None:
        raise ConfigError(
            f"data.path: trainer '{config.trainer}' learns from real latents, "
            f"but {config.data.path} holds prompts alone"
        )
    if method.needs_latents and dataset.latent_shape != shape:
        raise ConfigError(
            f"latent_shape: is {list(shape)}, but the latents in {config.data.path} "
            f"are {list(dataset.latent_shape or ())}"
        )
    sizes = folders["generator"].wan_config()
    if shape[0] != sizes.out_dim:
        raise ConfigError(
            f"latent_shape: has {shape[0]} channels, {folders['generator'].path} makes "
            f"{sizes.out_dim}"
        )
    _, patch_h, patch_w = sizes.patch_size
    if shape[2] % patch_h or shape[3] % patch_w:
        raise ConfigError(
            f"latent_shape: {shape[2]} x {shape[3]} does not divide into patches of "
            f"{patch_h} x {patch_w}"
        )
    return Inputs(folders, dataset, _validation_prompts(config, dataset), method)


def _validation_prompts(config: Config, dataset: Dataset) -> list[str]:
    count = config.validation.count
    if config.validation.prompts is not None:
        return read_prompt_file(Path(config.validation.prompts))[:count]
    return [dataset[i].prompt for i in range(min(count, len(dataset)))]


def claim_logdir(config: Config, session: Session, logdir: Path) -> None:
    """Make the log directory this run's own, or find that it is.

    Raises ConfigError with the differing keys if it belongs to another run.
    """
    path = logdir / "config.yaml"
    new = OmegaConf.create(to_yaml(config))
    whole = checkpoint.latest(logdir / "checkpoints")
    if whole is None and checkpoint.any_saved(logdir / "checkpoints"):
        raise ConfigError(
            f"{logdir}: all its checkpoints are damaged; restore one, or use a new --logdir"
        )
    if path.is_file() and whole is not None:
        changed = differences(OmegaConf.load(path), new)  # type: ignore[arg-type]
        foreign = [
            f"{key}: is {there}, now {here}"
            for key, (there, here) in changed.items()
            if not any(key == free or key.startswith(f"{free}.") for free in CHANGEABLE)
        ]
        if foreign:
            raise ConfigError(
                f"{logdir}: holds another run; use a new --logdir, or restore: {'; '.join(foreign)}"
            )
        for key, (there, here) in changed.items():
            log.info("continuing with %s = %s (was %s)", key, here, there)
    session.barrier()
    if session.is_main:
        write_text(path, to_yaml(config))


def _placement(config: Config, session: Session, *, trained: bool) -> Placement:
    compute = torch.bfloat16 if config.mixed_precision else torch.float32
    return Placement(
        device=session.device,
        storage=torch.float32 if trained else compute,
        compute=compute,
        mesh=build_mesh(session, config.sharding_strategy),
    )


def _build_network(
    config: Config, session: Session, inputs: Inputs, role: str
) -> WanDiffusionWrapper:
    settings = role_settings(config)[role]
    folder = inputs.folders[role]
    trained = role in inputs.method.trainable
    place = _placement(config, session, trained=trained)
    if isinstance(settings, TrainedNetworkConfig) and settings.random_init:
        return random_network(folder.wan_config(), config.seed, place)
    weights = find_weights(Path(settings.weights) if settings.weights else folder.path)
    network = load_network(folder.wan_config(), weights, place, what=f"{role} {folder.path}")
    return network.requires_grad_(trained)


def _build_encoder(config: Config, session: Session, folder: ModelFolder) -> ConditioningEncoder:
    dtype = torch.bfloat16 if config.mixed_precision else torch.float32
    text_encoder = WanTextEncoder(folder, folder.wan_config().text_len, dtype).to(session.device)
    return ConditioningEncoder(
        text_encoder, negative_prompt=config.data.negative_prompt, device=session.device
    )


def run_pipeline(config: Config, net: Denoiser) -> InferencePipeline:
    """The pipeline that samples a run's generator."""
    return inference_pipeline(
        net,
        distilled=config.trainer == "score_distillation",
        denoising_step_list=config.denoising_step_list,
        timestep_shift=config.timestep_shift,
        sampling=config.sampling,
    )


def _build_validator(
    config: Config, session: Session, options: RunOptions, inputs: Inputs
) -> Validator | None:
    if not config.validation.every:
        return None
    return Validator(
        prompts=inputs.prompts,
        build_pipeline=lambda net: run_pipeline(config, net),
        vae=load_vae(inputs.folders["generator"], session.device, torch.float32),
        latent_shape=config.latent_shape,
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


def _build_method_trainer(
    config: Config,
    method: type[Method],
    networks: dict[str, WanDiffusionWrapper],
    parts: TrainerParts,
) -> Trainer:
    if issubclass(method, DistributionMatching):
        sigmas = step_sigmas(config.denoising_step_list, config.timestep_shift)
        rollout = BidirectionalTrainingPipeline(sigmas)
        return ScoreDistillationTrainer(parts, method(config.loss, networks, rollout))  # type: ignore[arg-type]
    assert method is Diffusion and isinstance(config.loss, DiffusionConfig)
    return DiffusionTrainer(parts, Diffusion(config.loss, networks))


def _announce(config: Config, session: Session, networks: dict[str, WanDiffusionWrapper]) -> None:
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
