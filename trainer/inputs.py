"""What is checked before any weight is read: model folders, data, and the log directory."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from model.base import Method, Needs
from model.discriminator import tapped_layers
from model.folders.folder import ModelFolder, check_model, find_model
from model.folders.loading import check_weights, find_weights
from model.types import SPATIAL_STRIDE
from trainer.config import (
    CHANGEABLE,
    Config,
    TrainedNetworkConfig,
    causal_config,
    compute_dtype,
    method_class,
    method_name,
    role_model,
    role_settings,
    sigmas,
)
from utils import checkpoint
from utils.config import ConfigError, differences, to_yaml
from utils.data.dataset import (
    Dataset,
    RawItem,
    open_dataset,
    read_manifest,
)
from utils.data.embeddings import EmbeddingReader, check_embeddings
from utils.data.prompts import read_prompt_file
from utils.distributed import Session
from utils.files import write_text
from utils.weights import Weights, WeightsError

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the checks found."""

    folders: dict[str, ModelFolder]  # per role that is a Wan transformer
    dataset: Dataset
    shown: list[RawItem]  # what validation samples
    embeddings: EmbeddingReader | None  # None = the text encoder is loaded
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
    _check_data(config, needs, dataset, folders["generator"])
    if needs.backbone is not None:
        tapped_layers(folders[needs.backbone].wan_config(), config.discriminator)
    shown = _shown(config, dataset, folders["generator"])
    embeddings = _open_embeddings(config, dataset, folders["generator"])
    return Inputs(folders, dataset, shown, embeddings, method, needs)


def _check_networks(config: Config, needs: Needs) -> dict[str, ModelFolder]:
    root = Path(config.model_root)
    folders = {role: find_model(root, role_model(config, role)) for role in needs.networks}
    for role, folder in folders.items():
        settings = role_settings(config)[role]
        fresh = isinstance(settings, TrainedNetworkConfig) and settings.random_init
        own = fresh or settings.weights is not None
        check_model(
            folder,
            weights=not own,
            encoders=role == "generator",
            text=config.data.text_embeddings is None,
        )
        if not fresh:
            weights = role_weights(config, role, folder)
            check_weights(folder.wan_config(), weights, what=f"{role} {folder.path}")
    if len({folder.wan_config().sees_images for folder in folders.values()}) > 1:
        named = ", ".join(f"{role} {folder.path}" for role, folder in folders.items())
        raise ConfigError(
            f"teacher.model: an image-to-video model and a text-to-video model cannot be used "
            f"together; {named}"
        )
    like = {role: folders[role] for role in needs.same_architecture}
    if len({folder.wan_config() for folder in like.values()}) > 1:
        raise ConfigError(
            f"{' and '.join(f'{role}.model' for role in like)}: this method needs them of the "
            f"same architecture, got {', '.join(str(folder.path) for folder in like.values())}"
        )
    check_latent_shape(config.latent_shape, folders["generator"])
    return folders


def role_weights(config: Config, role: str, folder: ModelFolder) -> Weights:
    """Where a role begins: its own weights, or those of its model folder.

    Of a checkpoint with several networks a critic takes the critic, if there is one, and every
    other role the generator.
    """
    own = role_settings(config)[role].weights
    if own is not None and role == "critic":
        with contextlib.suppress(WeightsError):  # else the generator, or what is wrong with it
            return find_weights(Path(own), role="critic")
    return find_weights(Path(own) if own else folder.path)


def check_latent_shape(shape: Sequence[int], folder: ModelFolder) -> None:
    """Raise ConfigError unless the model in `folder` makes latents of `shape`, [C, F, H, W]."""
    sizes = folder.wan_config()
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


def _check_data(config: Config, needs: Needs, dataset: Dataset, folder: ModelFolder) -> None:
    """What the run reads must be there, in a shape that it can use."""
    path, held = config.data.path, next(iter(dataset.buckets))
    sees_images = folder.wan_config().sees_images
    if needs.latents and held.latents is None:
        who = f"method '{method_name(config)}' {needs.because}".rstrip()
        raise ConfigError(f"data.path: {who} needs real latents, but {path} holds none")
    if config.causal.given_first_frame and held.latents is None and held.image is None:
        raise ConfigError(
            f"data.path: causal.given_first_frame needs real latents or images, "
            f"but {path} holds none"
        )
    if folder.wan_config().image_count > 1:
        raise ConfigError(
            f"generator.model: {folder.path} needs last frames as well, which no training data "
            f"holds; first-last-frame models serve inference alone"
        )
    if sees_images and held.image is None:
        raise ConfigError(
            f"data.path: {folder.path} begins its videos with an image, but {path} holds none; "
            f"make shards with images by scripts/create_lmdb_14b_shards.py"
        )
    if sees_images and config.causal.rollout_frames is not None:
        raise ConfigError(
            "causal.rollout_frames: an image-to-video model is scored from its first frame on; "
            "set it to null"
        )
    if needs.latents or config.causal.given_first_frame or sees_images or config.data.buckets:
        _check_shapes(config, dataset, folder)
    if needs.trajectories:
        _check_trajectories(config, dataset)


def _check_shapes(config: Config, dataset: Dataset, folder: ModelFolder) -> None:
    """The shapes of the data must be the run's, or with buckets any that the model can make."""
    path, wanted = config.data.path, tuple(config.latent_shape)
    found = [(shapes.video(wanted), shapes) for shapes in dataset.buckets]
    others = [list(shape) for shape, _ in found if shape != wanted]
    if others and not config.data.buckets:
        what = "latents" if next(iter(dataset.buckets)).latents else "images"
        held = others[0] if len(found) == 1 else [list(shape) for shape, _ in found]
        several = "; data.buckets=true trains on them all" if len(found) > 1 else ""
        raise ConfigError(
            f"latent_shape: is {list(wanted)}, but the {what} in {path} are {held}{several}"
        )
    for shape, shapes in found:
        _, _, height, width = shape
        size = (SPATIAL_STRIDE * height, SPATIAL_STRIDE * width)
        if shapes.image not in (None, size):
            raise ConfigError(
                f"data.path: {path} holds images of {shapes.image} (height, width) with latents of "
                f"{list(shape)}; they should be {size}"
            )
        try:
            check_latent_shape(shape, folder)
        except ConfigError as error:
            raise ConfigError(f"data.path: {path} holds what does not fit: {error}") from error
        layout = causal_config(config)
        for problem in () if layout is None else layout.problems(shape[1]):
            raise ConfigError(f"data.path: {path} holds {list(shape)}: {problem}")


def _check_trajectories(config: Config, dataset: Dataset) -> None:
    """ODE pairs must hold the states at exactly the noise levels of this run."""
    path = Path(config.data.path)
    manifest = read_manifest(path)
    shapes = list(dataset.buckets)
    if manifest is None or shapes[0].trajectory is None:
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
    other = [list(found.trajectory or ()) for found in shapes if found.trajectory != expected]
    if other:
        raise ConfigError(f"data.path: trajectories in {path} are {other[0]}, not {list(expected)}")


def _shown(config: Config, dataset: Dataset, folder: ModelFolder) -> list[RawItem]:
    """The records, or the prompts of a file, that validation samples."""
    count, file = config.validation.count, config.validation.prompts
    begins_with_image = folder.wan_config().sees_images or config.causal.given_first_frame
    if file is not None:
        if begins_with_image:
            raise ConfigError(
                "validation.prompts: this run's videos begin with an image, which a prompt file "
                "does not hold; set it to null to show the data's first records"
            )
        return [RawItem(prompt) for prompt in read_prompt_file(Path(file))[:count]]
    if not begins_with_image:
        return [RawItem(dataset.prompt(i)) for i in range(min(count, len(dataset)))]
    shape = tuple(config.latent_shape)
    fitting = [
        record
        for shapes, records in dataset.buckets.items()
        if shapes.video(shape) == shape
        for record in records[:count]
    ]
    if config.validation.every and not fitting:
        raise ConfigError(
            f"latent_shape: validation samples {list(shape)}, but no record of {config.data.path} "
            f"has that shape; choose one of the data's"
        )
    return [dataset[i] for i in sorted(fitting)[:count]]


def needed_prompts(config: Config, dataset: Dataset) -> list[str]:
    """All that a run encodes, with repetitions: its data's, validation's and negative prompts."""
    prompts = [config.data.negative_prompt]
    if config.validation.prompts is not None:
        prompts += read_prompt_file(Path(config.validation.prompts))[: config.validation.count]
    return prompts + [dataset.prompt(i) for i in range(len(dataset))]


def _open_embeddings(
    config: Config, dataset: Dataset, folder: ModelFolder
) -> EmbeddingReader | None:
    """The encoded prompts, if the run reads them; all that it needs must be there."""
    if config.data.text_embeddings is None:
        return None
    reader, sizes = EmbeddingReader(Path(config.data.text_embeddings)), folder.wan_config()
    check_embeddings(
        reader,
        needed_prompts(config, dataset),
        text_len=sizes.text_len,
        text_dim=sizes.text_dim,
        dtype=compute_dtype(config),
    )
    return reader


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
