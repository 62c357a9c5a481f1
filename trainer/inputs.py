"""What is checked before any weight is read: ranks, model folders, weights and data."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from model.discriminator import tapped_layers
from model.families.base import Model
from model.families.registry import check_model
from trainer.bases import check_adapters
from trainer.config import Config, ValidationConfig
from trainer.experts import check_offload
from trainer.limits import check_memory
from trainer.run import Run
from utils.config import ConfigError
from utils.context_parallel import ranks_at_hand, sharing_problems
from utils.data.dataset import (
    Dataset,
    RawItem,
    RecordShapes,
    TrajectoryManifest,
    captions,
    open_dataset,
)
from utils.data.embeddings import EmbeddingReader, check_embeddings
from utils.data.lmdb_reading import DamagedRecordError
from utils.data.prompts import read_prompt_file
from utils.distributed import Session
from utils.health.settings import HealthConfig
from utils.records import read_manifest

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the checks found beside the models."""

    dataset: Dataset
    shown: list[RawItem]  # what validation samples
    probed: list[RawItem]  # what health probes sample; none without probes
    embeddings: EmbeddingReader | None  # None = the text encoder is loaded


def check_inputs(run: Run, session: Session) -> Inputs:
    """Look at every file and number that the run depends on; nothing heavy is read."""
    config, session = run.config, replace(session, group=run.config.parallel.context)
    _refuse(rank_problems(run, session.world_size, ranks_at_hand(session.world_size)))
    run.check_kernel(session.device, run.compute, grad=True)
    check_offload(config, run.offloaded, session.world_size)
    _check_models(run)
    model = run.model
    tokens, features = model.latent.tokens(run.latent_shape), model.features
    check_memory(config, session, tokens=tokens, layers=features.layers, width=features.width)
    dataset = open_dataset(Path(config.data.path))
    _check_data(run, dataset)
    if run.needs.backbone is not None:
        tapped_layers(run.models[run.needs.backbone].features, config.discriminator)
    shown = _fixed(run, dataset, "validation", config.validation)
    probed = _fixed(run, dataset, "health", config.health) if config.health.every else []
    return Inputs(dataset, shown, probed, _open_embeddings(run, dataset))


def _refuse(problems: Iterable[str]) -> None:
    """Raise ConfigError with all problems, if there are any."""
    found = list(problems)
    if found:
        raise ConfigError("\n".join(found))


def rank_problems(run: Run, ranks: int, host: Mapping[str, int]) -> Iterator[str]:
    """Why a run cannot be laid over so many ranks, one line each.

    host: how many of them are on one host, by how they are called, see `ranks_at_hand`.
    """
    config, group = run.config, run.config.parallel.context
    counts = {
        f"attention heads of {role} {model.path}": model.features.heads
        for role, model in run.models.items()
    }
    counts = {**counts, **_frame_tokens(run, run.latent_shape), **host}
    found = list(sharing_problems("parallel.context", group, counts))
    yield from found
    groups = ranks // group
    share = config.accumulation * groups
    if not found and config.batch_size % share:
        who = "ranks" if group == 1 else f"groups of {group} ranks"
        yield (
            f"batch_size: {config.batch_size} samples do not divide over {groups} {who} x "
            f"{config.accumulation} micro-batches; use a multiple of {share}"
        )


def _frame_tokens(run: Run, shape: Sequence[int]) -> dict[str, int]:
    """The tokens of a frame of latents [C, F, H, W], as `sharing_problems` has them."""
    tokens = run.model.latent.tokens((shape[0], 1, *shape[2:]))
    return {f"tokens of a frame of latents {list(shape)}": tokens}


def _check_models(run: Run) -> None:
    config = run.config
    for role, model in run.models.items():
        fresh = run.random_init(role)
        check_model(
            model,
            weights=not fresh and config.networks[role].weights is None,
            encoders=role == "generator",
            text=config.data.text_embeddings is None,
        )
        if not fresh:
            model.check_weights(run.weights(role), what=f"{role} {model.path}")
    check_adapters(run)
    _refuse(model_problems(run))


def model_problems(run: Run) -> Iterator[str]:
    """Why the models of a run's roles cannot serve together or its shape, one line each."""
    models = run.models
    if len({model.images and model.images.how for model in models.values()}) > 1:
        named = ", ".join(f"{role} {model.path}" for role, model in models.items())
        yield (
            f"teacher.model: an image-to-video model and a text-to-video model cannot be used "
            f"together; {named}"
        )
    alike = {role: models[role] for role in run.needs.same_architecture}
    if len({model.architecture for model in alike.values()}) > 1:
        yield (
            f"{' and '.join(f'{role}.model' for role in alike)}: this method needs them of the "
            f"same architecture, got {', '.join(str(model.path) for model in alike.values())}"
        )
    if "teacher" in models:
        yield from run.config.loss.layer_problems(models["teacher"].features.layers)
    yield from _image_share_problems(run)
    yield from _latent_problems(run)
    yield from latent_shape_problems(run.config.latent_shape, run.model)


def _image_share_problems(run: Run) -> Iterator[str]:
    """Why only some of the run's batches cannot begin with an image."""
    share, model = run.config.data.image_share, run.model
    if share is None or run.takes_given:
        return
    if run.reads_images:
        yield f"data.image_share: {model.path} begins all its videos with an image; set it to null"
    elif share > 0.0 and (run.causal is None or run.needs.rollout != "simulation"):
        yield (
            f"data.image_share: {model.path} makes clips from text alone, and of such models only "
            f"rollouts of a causal generator begin with given frames, which method "
            f"'{run.method_name}' with generator_type: {run.config.generator_type} does not make; "
            f"set it to null, or use a model that takes images as first frames (TI2V)"
        )


def _latent_problems(run: Run) -> Iterator[str]:
    """All roles must speak of the same latents and texts."""
    own = run.model
    for role, model in run.models.items():
        for what in ("latent", "text"):
            theirs, ours = getattr(model, what), getattr(own, what)
            if theirs != ours:
                yield (
                    f"{role}.model: {model.path} has {theirs}, but the generator's {own.path} has "
                    f"{ours}; use models of one family"
                )


def latent_shape_problems(shape: Sequence[int], model: Model) -> Iterator[str]:
    """Why `model` does not make latents of `shape`, [C, F, H, W]."""
    latent = model.latent
    if shape[0] != latent.channels:
        yield f"latent_shape: has {shape[0]} channels, {model.path} makes {latent.channels}"
    rows, columns = latent.patch
    if shape[2] % rows or shape[3] % columns:
        yield (
            f"latent_shape: {shape[2]} x {shape[3]} does not divide into patches of "
            f"{rows} x {columns}"
        )


def check_latent_shape(shape: Sequence[int], model: Model) -> None:
    """Raise ConfigError unless `model` makes latents of `shape`, [C, F, H, W]."""
    _refuse(latent_shape_problems(shape, model))


def _check_data(run: Run, dataset: Dataset) -> None:
    """What the run reads must be there, in a shape that it can use."""
    config, needs = run.config, run.needs
    path, held = config.data.path, next(iter(dataset.buckets))
    if needs.latents and held.latents is None:
        who = f"method '{run.method_name}' {needs.because}".rstrip()
        raise ConfigError(f"data.path: {who} needs real latents, but {path} holds none")
    if run.given_share > 0.0 and held == RecordShapes():
        key = "causal.given_first_frame" if config.data.image_share is None else "data.image_share"
        raise ConfigError(f"data.path: {key} needs real latents or images, but {path} holds none")
    if run.reads_images:
        _check_first_images(run, has_images=held.image is not None)
    if needs.latents or run.begins_with_given or config.data.buckets:
        _check_shapes(run, dataset)
    if needs.trajectories:
        _check_trajectories(run, dataset)


def _check_first_images(run: Run, *, has_images: bool) -> None:
    """What an image-to-video model asks of data and rollouts."""
    config, model = run.config, run.model
    if model.images is not None and model.images.count > 1:
        raise ConfigError(
            f"generator.model: {model.path} needs last frames as well, which no training data "
            f"holds; first-last-frame models serve inference alone"
        )
    if not has_images:
        raise ConfigError(
            f"data.path: {model.path} begins its videos with an image, but {config.data.path} "
            f"holds none; make shards with images by scripts/create_lmdb_14b_shards.py"
        )
    if config.causal.rollout_frames is not None:
        raise ConfigError(
            "causal.rollout_frames: an image-to-video model is scored from its first frame on; "
            "set it to null"
        )


def _check_shapes(run: Run, dataset: Dataset) -> None:
    """The shapes of the data must be the run's, or with buckets any that the model can make."""
    config, model = run.config, run.model
    path, wanted = config.data.path, run.latent_shape
    stride = model.latent.spatial_stride
    found = [(shapes.video(wanted, stride), shapes) for shapes in dataset.buckets]
    others = [list(shape) for shape, _ in found if shape != wanted]
    if others and not config.data.buckets:
        what = "latents" if next(iter(dataset.buckets)).latents else "images"
        held = others[0] if len(found) == 1 else [list(shape) for shape, _ in found]
        several = "; data.buckets=true trains on them all" if len(found) > 1 else ""
        raise ConfigError(
            f"latent_shape: is {list(wanted)}, but the {what} in {path} are {held}{several}"
        )
    for shape, shapes in found:
        size = model.latent.pixel_size(shape[2], shape[3])
        if shapes.image not in (None, size):
            raise ConfigError(
                f"data.path: {path} holds images of {shapes.image} (height, width) with latents of "
                f"{list(shape)}; they should be {size}"
            )
        try:
            check_latent_shape(shape, model)
        except ConfigError as error:
            raise ConfigError(f"data.path: {path} holds what does not fit: {error}") from error
        ranks, tokens = config.parallel.context, _frame_tokens(run, shape)
        for problem in sharing_problems("parallel.context", ranks, tokens):
            raise ConfigError(f"data.path: {path}: {problem}")
        for problem in () if run.causal is None else run.causal.problems(shape[1]):
            raise ConfigError(f"data.path: {path} holds {list(shape)}: {problem}")


def _check_trajectories(run: Run, dataset: Dataset) -> None:
    """ODE pairs must hold the states at exactly the noise levels of this run."""
    config, path = run.config, Path(run.config.data.path)
    manifest = read_manifest(path, TrajectoryManifest)
    shapes = list(dataset.buckets)
    if manifest is None or shapes[0].trajectory is None:
        raise ConfigError(
            f"data.path: {path} holds no ODE pairs; make them with scripts/generate_ode_pairs.py"
        )
    here: dict[str, Any] = {
        "denoising_step_list": config.denoising_step_list,
        "timestep_shift": config.timestep_shift,
        "latent_shape": config.latent_shape,
    }
    there: dict[str, Any] = {key: getattr(manifest, key) for key in here}
    if run.takes_given:  # pairs begin with images all of them, or none
        here["data.image_share"] = run.given_share
        there["data.image_share"] = 1.0 if manifest.images else 0.0
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
    expected = (len(run.sampling.sigmas) + 1, *run.latent_shape)
    other = [list(found.trajectory or ()) for found in shapes if found.trajectory != expected]
    if other:
        raise ConfigError(f"data.path: trajectories in {path} are {other[0]}, not {list(expected)}")


def _fixed(
    run: Run, dataset: Dataset, section: str, asked: ValidationConfig | HealthConfig
) -> list[RawItem]:
    """The records, or the prompts of a file, that a section of the settings samples again."""
    config, shape = run.config, run.latent_shape
    count, file = asked.count, asked.prompts
    if file is not None:
        if run.always_begins:
            raise ConfigError(
                f"{section}.prompts: this run's videos begin with an image, which a prompt file "
                "does not hold; set it to null to show the data's first records"
            )
        return [RawItem(prompt) for prompt in read_prompt_file(Path(file))[:count]]
    if not run.begins_with_given:
        whole = (caption for caption in captions(dataset) if caption is not None)
        return [RawItem(caption) for caption in islice(whole, count)]
    fitting = [
        record
        for shapes, records in dataset.buckets.items()
        if shapes.video(shape, run.model.latent.spatial_stride) == shape
        for record in records
    ]
    if asked.every and not fitting:
        raise ConfigError(
            f"latent_shape: {section} samples {list(shape)}, but no record of {config.data.path} "
            f"has that shape; choose one of the data's"
        )
    return list(islice(_whole(dataset, sorted(fitting)), count))


def _whole(dataset: Dataset, records: Iterable[int]) -> Iterator[RawItem]:
    """Those of some records that can be read."""
    for record in records:
        with contextlib.suppress(DamagedRecordError):
            yield dataset[record]


def needed_prompts(config: Config, dataset: Dataset) -> list[str]:
    """All that a run encodes, with repetitions: its data's, fixed and negative prompts."""
    prompts = [config.data.negative_prompt]
    for asked in (config.validation, config.health):
        if asked.prompts is not None:
            prompts += read_prompt_file(Path(asked.prompts))[: asked.count]
    return prompts + [caption for caption in captions(dataset) if caption is not None]


def _open_embeddings(run: Run, dataset: Dataset) -> EmbeddingReader | None:
    """The encoded prompts, if the run reads them; all that it needs must be there."""
    config, text = run.config, run.model.text
    if config.data.text_embeddings is None:
        return None
    reader = EmbeddingReader(Path(config.data.text_embeddings))
    check_embeddings(
        reader,
        needed_prompts(config, dataset),
        text_len=text.length,
        text_dim=text.width,
        dtype=run.compute,
    )
    return reader
