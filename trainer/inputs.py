"""What is checked before any weight is read: model folders, data, and the log directory."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from model.base import Method, Needs
from model.discriminator import tapped_layers
from model.dmd import DMDConfig
from model.folder import ModelFolder, check_model, find_model
from model.loading import check_weights, find_weights
from trainer.config import (
    CHANGEABLE,
    Config,
    TrainedNetworkConfig,
    method_class,
    method_name,
    role_model,
    role_settings,
    sigmas,
)
from utils import checkpoint
from utils.config import ConfigError, differences, to_yaml
from utils.dataset import Dataset, open_dataset, read_manifest, read_prompt_file
from utils.distributed import Session
from utils.files import write_text

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the checks found."""

    folders: dict[str, ModelFolder]  # per role that is a Wan transformer
    dataset: Dataset
    prompts: list[str]  # for validation
    method: type[Method]
    needs: Needs


def check_inputs(config: Config, session: Session) -> Inputs:
    """Look at every file and number that the run depends on; nothing heavy is read."""
    method = method_class(config)
    needs = method.needs(config.loss)
    share = config.accumulation * session.world_size
    if config.batch_size % share:
        raise ConfigError(
            f"batch_size: {config.batch_size} samples do not divide over {session.world_size} "
            f"ranks x {config.accumulation} micro-batches; use a multiple of {share}"
        )
    folders = _check_networks(config, needs)
    dataset = open_dataset(Path(config.data.path))
    _check_data(config, needs, dataset)
    if needs.judged is not None:
        tapped_layers(folders[needs.judged].wan_config(), config.discriminator)
    return Inputs(folders, dataset, _validation_prompts(config, dataset), method, needs)


def _check_networks(config: Config, needs: Needs) -> dict[str, ModelFolder]:
    root = Path(config.model_root)
    folders = {role: find_model(root, role_model(config, role)) for role in needs.networks}
    for role, folder in folders.items():
        settings = role_settings(config)[role]
        fresh = isinstance(settings, TrainedNetworkConfig) and settings.random_init
        own = fresh or settings.weights is not None
        check_model(folder, weights=not own, encoders=role == "generator")
        if not fresh:
            weights = find_weights(Path(settings.weights) if settings.weights else folder.path)
            check_weights(folder.wan_config(), weights, what=f"{role} {folder.path}")
    if len({folders[role].wan_config() for role in needs.alike}) > 1:
        raise ConfigError(
            f"{' and '.join(f'{role}.model' for role in needs.alike)}: this method needs them of "
            f"the same architecture, got {', '.join(str(folders[r].path) for r in needs.alike)}"
        )
    check_latent_shape(config, folders["generator"])
    return folders


def check_latent_shape(config: Config, folder: ModelFolder) -> None:
    """Raise ConfigError unless the model in `folder` makes latents of the configured shape."""
    shape, sizes = config.latent_shape, folder.wan_config()
    if shape[0] != sizes.out_dim:
        raise ConfigError(
            f"latent_shape: has {shape[0]} channels, {folder.path} makes {sizes.out_dim}"
        )
    _, patch_h, patch_w = sizes.patch_size
    if shape[2] % patch_h or shape[3] % patch_w:
        raise ConfigError(
            f"latent_shape: {shape[2]} x {shape[3]} does not divide into patches of "
            f"{patch_h} x {patch_w}"
        )


def _check_data(config: Config, needs: Needs, dataset: Dataset) -> None:
    shape, path = tuple(config.latent_shape), config.data.path
    wanted = needs.latents or config.causal.given_first_frame
    if wanted and dataset.latent_shape is None:
        who = f"method '{method_name(config)}'" if needs.latents else "causal.given_first_frame"
        if needs.latents and isinstance(config.loss, DMDConfig) and config.loss.judges:
            who += " with loss.gan_weight or loss.divergence"
        raise ConfigError(f"data.path: {who} needs real latents, but {path} holds none")
    if wanted and dataset.latent_shape != shape:
        raise ConfigError(
            f"latent_shape: is {list(shape)}, but the latents in {path} "
            f"are {list(dataset.latent_shape or ())}"
        )
    if needs.trajectories:
        _check_trajectories(config, dataset)


def _check_trajectories(config: Config, dataset: Dataset) -> None:
    """ODE pairs must hold the states at exactly the noise levels of this run."""
    path = Path(config.data.path)
    manifest = read_manifest(path)
    if manifest is None or dataset.trajectory_shape is None:
        raise ConfigError(
            f"data.path: {path} holds no ODE pairs; make them with scripts/generate_ode_pairs.py"
        )
    here = {
        "denoising_step_list": config.denoising_step_list,
        "timestep_shift": config.timestep_shift,
        "latent_shape": config.latent_shape,
    }
    there = {key: getattr(manifest, key) for key in here}
    differing = [f"{key} {there[key]}, here {here[key]}" for key in here if there[key] != here[key]]
    if differing:
        raise ConfigError(
            f"data.path: the ODE pairs in {path} were made with {'; '.join(differing)}; set the "
            f"same, or make pairs of your own with scripts/generate_ode_pairs.py"
        )
    if len(dataset) != manifest.count:
        raise ConfigError(
            f"data.path: {path} holds {len(dataset)} of {manifest.count} ODE pairs; run "
            f"scripts/generate_ode_pairs.py again to finish it"
        )
    expected = (len(sigmas(config)) + 1, *config.latent_shape)
    if dataset.trajectory_shape != expected:
        raise ConfigError(
            f"data.path: trajectories in {path} are {list(dataset.trajectory_shape)}, "
            f"not {list(expected)}"
        )


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
