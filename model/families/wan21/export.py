"""Write whole Wan folders, official or diffusers', from a folder of either layout."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from model.encoders.clip import MEAN, STD, read_image_encoder
from model.encoders.clip import to_official as official_clip
from model.encoders.text import load_tokenizer
from model.encoders.umt5 import TIED, open_umt5
from model.encoders.umt5 import to_official as official_umt5
from model.encoders.vae import open_vae
from model.encoders.vae_names import to_official as official_vae_names
from model.encoders.vae_sizes import name_of
from model.families.base import Export
from model.families.wan21.folder import (
    CONFIG,
    HOMES,
    IMAGE_ENCODER,
    MODEL_INDEX,
    TEXT_ENCODER,
    TOKENIZER,
    VAE22_FILE,
    VAE_FILE,
    VAE_FOLDER,
    ModelFolder,
)
from model.families.wan21.weights import one_side
from model.folders.component import STEMS, read_json
from model.folders.writing import appearing, check_target, copy_if_there, copy_part, write_shards
from model.types import Side
from model.wan.config import diffusers_config, write_wan_config
from model.wan.weights import to_diffusers
from utils.errors import UserError
from utils.files import writing
from utils.weights import Weights, check_fits

log = logging.getLogger(__name__)

LAYOUTS = ("official", "diffusers")
CLIP_TOKENIZER = "xlm-roberta-large"  # nothing here reads it; official code looks for it
CLIP_PREFIX = "vision_model."  # as transformers 4 names its weights; 5 reads them too
FLOW_SHIFT = 3.0  # of the scheduler in diffusers' folders; Wan's own advice for 480p

MODEL_STEM, TRANSFORMERS_STEM = STEMS
SCHEDULER, IMAGE_PROCESSOR = "scheduler", "image_processor"  # folders of diffusers' layout
SCHEDULER_CONFIG = "scheduler_config.json"


NO_PART = [None, None]  # in the index of diffusers' layout: a part that a pipeline may do without


@dataclass(frozen=True)
class Release:
    """How a family's folders differ from those of one transformer of Wan2.1."""

    sides: tuple[Side | None, ...] = (None,)  # whose transformers they hold
    shift: float | None = None  # of the scheduler; None = the source's, or Wan2.1's
    index: Mapping[str, Any] = field(default_factory=dict)  # in model_index.json
    private: Mapping[str, Any] = field(default_factory=dict)  # in official config.json files


def check_export(source: ModelFolder, export: Export, target: Path) -> None:
    """Raise UserError that says why `export` cannot be written to `target`. Cheap.

    source: a complete folder, which gives the sizes and all but the transformers' weights; that
    these fit is for the caller to check.
    """
    check_target(target)
    config = source.wan_config()
    if export.layout == "diffusers":
        try:
            diffusers_config(config)
        except ValueError as error:
            raise UserError(f"{source.path}: no folder for diffusers: {error}") from error
        if not _is_wans(vae := _present(source.vae)):
            raise UserError(f"{vae}: this codec is no VAE of diffusers'")


def write_model_folder(source: ModelFolder, export: Export, target: Path, release: Release) -> None:
    """Write a model folder, after `check_export`; it appears whole or not at all.

    The transformers' weights are read and written a shard at a time. Raises WeightsError for parts
    of the source that are not what their names say.
    """
    with appearing(target) as part:
        _write_folder(source, export, part, release)


def _write_folder(source: ModelFolder, export: Export, target: Path, release: Release) -> None:
    diffusers = export.layout == "diffusers"
    # Small parts first: a wrong one is found before gigabytes are written.
    vae = _present(source.vae)
    if _is_wans(vae):
        _write_part(replace(VAE, file=source.codecs[0]), vae, target, export)
    else:
        copy_part(vae, target / vae.name)
    if source.wan_config().reads_clip:
        _write_part(CLIP, _present(source.image_encoder), target, export)
    copy_part(_present(source.tokenizer), target / ("tokenizer" if diffusers else TOKENIZER))
    if diffusers:
        _write_diffusers_extras(source, target, release)
    else:
        copy_if_there(source.path / CLIP_TOKENIZER, target / CLIP_TOKENIZER)
    _write_part(UMT5, _present(source.text_encoder), target, export)
    for side in release.sides:
        _write_transformer(source, export, target, side, release)
    for name, text in export.texts.items():
        (target / name).write_text(text, encoding="utf-8")


def _present(path: Path | None) -> Path:
    assert path is not None, "check_model comes first"
    return path


def _is_wans(codec: Path) -> bool:
    """Whether a codec is Wan's autoencoder; another family's, of this transformer, is copied."""
    return codec.name in (VAE_FILE, VAE22_FILE, VAE_FOLDER)


# ---- the transformers


def _write_transformer(
    source: ModelFolder, export: Export, target: Path, side: Side | None, release: Release
) -> None:
    config, diffusers = source.wan_config(), export.layout == "diffusers"
    folder = target / HOMES[side][diffusers]
    folder.mkdir(exist_ok=True)
    if diffusers:
        _write_json(folder / CONFIG, diffusers_config(config))
    else:
        write_wan_config(config, folder / CONFIG, release.private)
    metadata = {"source": str(export.weights.path)}
    tensors = _transformer(export, side)
    write_shards(tensors, folder, MODEL_STEM, export.max_shard_bytes, metadata)


def _transformer(export: Export, side: Side | None) -> Iterator[tuple[str, Tensor]]:
    rename = to_diffusers if export.layout == "diffusers" else str
    weights = export.weights if side is None else one_side(export.weights, side)
    what = "transformer" if side is None else f"{side}-noise transformer"
    for name in tqdm(weights.shapes(), desc=what, unit="tensor"):
        value = weights.read(name)
        yield rename(name), value if export.dtype is None else value.to(export.dtype)


# ---- the other networks


@dataclass(frozen=True)
class Part:
    """A network beside the transformer: its place in either layout, and its translation."""

    file: str  # of the official layout
    folder: str  # of diffusers' layout
    stem: str  # of the weight files there
    read: Callable[[Path], tuple[Any, dict[str, Tensor]]]  # without weights; those, by its names
    to_official: Callable[[dict[str, Tensor]], dict[str, Tensor]]


def _read_vae(path: Path) -> tuple[Any, dict[str, Tensor]]:
    vae, weights = open_vae(path)
    return _state(vae, weights, what=name_of(vae.config))


def _read_umt5(path: Path) -> tuple[Any, dict[str, Tensor]]:
    return _state(*open_umt5(path), what="a UMT5 encoder")


def _read_image_encoder(path: Path) -> tuple[Any, dict[str, Tensor]]:
    from transformers import CLIPVisionModel  # slow to import

    config, state = read_image_encoder(path)
    with torch.device("meta"):
        return CLIPVisionModel(config), {CLIP_PREFIX + name: v for name, v in state.items()}


def _state(network: Any, weights: Weights, *, what: str) -> tuple[Any, dict[str, Tensor]]:
    check_fits(network, weights, what=what)
    return network, {name: weights.read(name) for name in network.state_dict() if name != TIED}


def _official_vae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = official_vae_names(state)
    return {names[name]: value for name, value in state.items()}


VAE = Part(VAE_FILE, VAE_FOLDER, MODEL_STEM, _read_vae, _official_vae)
UMT5 = Part(TEXT_ENCODER, "text_encoder", TRANSFORMERS_STEM, _read_umt5, official_umt5)
CLIP = Part(IMAGE_ENCODER, "image_encoder", TRANSFORMERS_STEM, _read_image_encoder, official_clip)


def _write_part(part: Part, source: Path, target: Path, export: Export) -> None:
    """Copy a network, or translate it if `source` is of the other layout; bits are kept."""
    diffusers = export.layout == "diffusers"
    wanted = target / (part.folder if diffusers else part.file)
    if source.is_dir() == diffusers:
        copy_part(source, wanted)
        return
    network, state = part.read(source)
    if not diffusers:
        with writing(wanted):
            torch.save(part.to_official(state), wanted)
        return
    write_shards(state.items(), wanted, part.stem, export.max_shard_bytes, {})
    _write_config(network, wanted, next(iter(state.values())).dtype)


def _write_config(network: Any, folder: Path, dtype: torch.dtype) -> None:
    if hasattr(network, "save_config"):  # diffusers' networks; transformers' have a config object
        network.save_config(folder)
        return
    network.config.architectures = [type(network).__name__]
    network.config.dtype = dtype
    network.config.save_pretrained(folder)


# ---- the rest


def _write_diffusers_extras(source: ModelFolder, target: Path, release: Release) -> None:
    """The scheduler, the image processor and the index, as diffusers' pipelines look for them."""
    _write_scheduler(source.path / SCHEDULER, target / SCHEDULER, release.shift)
    if source.wan_config().reads_clip and not copy_if_there(
        source.path / IMAGE_PROCESSOR, target / IMAGE_PROCESSOR
    ):
        _write_image_processor(target)
    theirs = read_json(source.path / MODEL_INDEX)
    values = {**(theirs or _index(source, target)), **release.index}
    if values == theirs:
        copy_part(source.path / MODEL_INDEX, target / MODEL_INDEX)
    else:
        _write_json(target / MODEL_INDEX, values)


def _index(source: ModelFolder, target: Path) -> dict[str, Any]:
    """The model_index.json of a folder of diffusers' layout."""
    import diffusers  # slow to import
    import transformers

    index: dict[str, Any] = {
        "_class_name": "WanPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    tokenizer = load_tokenizer(target / "tokenizer")
    name = type(tokenizer).__name__
    # The same class in transformers 5; in 4 the plain name is the slow one's.
    fast = f"{name}Fast" if hasattr(transformers, f"{name}Fast") else name
    index["tokenizer"] = ["transformers", fast]
    sizes = source.wan_config()
    if sizes.given_latents:
        index["_class_name"] = "WanImageToVideoPipeline"
        clip = sizes.reads_clip
        index["image_encoder"] = ["transformers", "CLIPVisionModel"] if clip else NO_PART
        index["image_processor"] = ["transformers", "CLIPImageProcessor"] if clip else NO_PART
    return index


def _write_scheduler(source: Path, target: Path, shift: float | None) -> None:
    """The scheduler with a shift of its noise levels; None = the source's, or Wan2.1's."""
    from diffusers import UniPCMultistepScheduler  # slow to import

    if not copy_if_there(source, target):
        UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=FLOW_SHIFT if shift is None else shift,
        ).save_pretrained(target)
        return
    values = read_json(target / SCHEDULER_CONFIG)
    if shift is not None and values.get("flow_shift") != shift:
        log.info(
            "%s: its flow_shift of %s is not kept: the new folder's is %g",
            source, values.get("flow_shift"), shift,
        )  # fmt: skip
        _write_json(target / SCHEDULER_CONFIG, values | {"flow_shift": shift})


def _write_image_processor(target: Path) -> None:
    """Straight to the encoder's square, whatever the aspect ratio, as Wan was trained."""
    encoder = json.loads((target / CLIP.folder / CONFIG).read_text(encoding="utf-8"))
    square = {"height": encoder["image_size"], "width": encoder["image_size"]}
    (target / IMAGE_PROCESSOR).mkdir()
    _write_json(
        target / IMAGE_PROCESSOR / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": square,
            "resample": 3,  # bicubic
            "do_center_crop": False,
            "crop_size": square,
            "do_rescale": True,
            "rescale_factor": 1.0 / 255.0,
            "do_normalize": True,
            "image_mean": list(MEAN),
            "image_std": list(STD),
        },
    )


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
