"""Write whole Wan2.1 folders, official or diffusers', from a folder of either layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from model.encoders.clip import MEAN, STD, read_image_encoder
from model.encoders.clip import to_official as official_clip
from model.encoders.umt5 import TIED, open_umt5
from model.encoders.umt5 import to_official as official_umt5
from model.encoders.vae import open_vae
from model.encoders.vae_names import to_official as official_vae_names
from model.encoders.vae_sizes import name_of
from model.families.base import Export
from model.families.wan21.folder import (
    CONFIG,
    IMAGE_ENCODER,
    MODEL_INDEX,
    TEXT_ENCODER,
    TOKENIZER,
    VAE_FILE,
    VAE_FOLDER,
    ModelFolder,
)
from model.families.wan21.weights import check_weights
from model.folders.component import STEMS
from model.folders.writing import appearing, check_target, copy_if_there, copy_part, write_shards
from model.wan.config import diffusers_config, write_wan_config
from model.wan.weights import to_diffusers
from utils.errors import UserError
from utils.files import writing
from utils.weights import Weights, check_fits

LAYOUTS = ("official", "diffusers")
CLIP_TOKENIZER = "xlm-roberta-large"  # nothing here reads it; official code looks for it
CLIP_PREFIX = "vision_model."  # as transformers 4 names its weights; 5 reads them too
FLOW_SHIFT = 3.0  # of the scheduler in diffusers' folders; Wan's own advice for 480p

MODEL_STEM, TRANSFORMERS_STEM = STEMS
SCHEDULER, IMAGE_PROCESSOR = "scheduler", "image_processor"  # folders of diffusers' layout


def check_export(source: ModelFolder, export: Export, target: Path) -> None:
    """Raise UserError that says why `export` cannot be written to `target`. Cheap.

    source: a complete folder, which gives the sizes and all but the transformer's weights.
    """
    check_target(target)
    config = source.wan_config()
    check_weights(config, export.weights, what=f"the transformer of {source.path}")
    if export.layout == "diffusers":
        try:
            diffusers_config(config)
        except ValueError as error:
            raise UserError(f"{source.path}: no folder for diffusers: {error}") from error
        if not _is_wans(vae := _present(source.vae)):
            raise UserError(f"{vae}: this codec is no VAE of diffusers'")


def write_model_folder(source: ModelFolder, export: Export, target: Path) -> None:
    """Write a model folder, after `check_export`; it appears whole or not at all.

    The transformer's weights are read and written a shard at a time. Raises WeightsError for parts
    of the source that are not what their names say.
    """
    with appearing(target) as part:
        _write_folder(source, export, part)


def _write_folder(source: ModelFolder, export: Export, target: Path) -> None:
    diffusers = export.layout == "diffusers"
    # Small parts first: a wrong one is found before gigabytes are written.
    vae = _present(source.vae)
    if _is_wans(vae):
        _write_part(VAE, vae, target, export)
    else:
        copy_part(vae, target / vae.name)
    if source.wan_config().reads_clip:
        _write_part(CLIP, _present(source.image_encoder), target, export)
    copy_part(_present(source.tokenizer), target / ("tokenizer" if diffusers else TOKENIZER))
    if diffusers:
        _write_diffusers_extras(source, export, target)
    else:
        copy_if_there(source.path / CLIP_TOKENIZER, target / CLIP_TOKENIZER)
    _write_part(UMT5, _present(source.text_encoder), target, export)
    _write_transformer(source, export, target)
    for name, text in export.texts.items():
        (target / name).write_text(text, encoding="utf-8")


def _present(path: Path | None) -> Path:
    assert path is not None, "check_model comes first"
    return path


def _is_wans(codec: Path) -> bool:
    """Whether a codec is Wan's autoencoder; another family's, of this transformer, is copied."""
    return codec.name in (VAE_FILE, VAE_FOLDER)


# ---- the transformer


def _write_transformer(source: ModelFolder, export: Export, target: Path) -> None:
    config, folder = source.wan_config(), target
    if export.layout == "diffusers":
        folder = target / "transformer"
        folder.mkdir()
        _write_json(folder / CONFIG, diffusers_config(config))
    else:
        write_wan_config(config, folder / CONFIG)
    metadata = {"source": str(export.weights.path)}
    write_shards(_transformer(export), folder, MODEL_STEM, export.max_shard_bytes, metadata)


def _transformer(export: Export) -> Iterator[tuple[str, Tensor]]:
    rename = to_diffusers if export.layout == "diffusers" else str
    for name in tqdm(export.weights.shapes(), desc="transformer", unit="tensor"):
        value = export.weights.read(name)
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


def _write_diffusers_extras(source: ModelFolder, export: Export, target: Path) -> None:
    """The scheduler, the image processor and the index, as diffusers' pipelines look for them."""
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
    if export.shift or not copy_if_there(source.path / SCHEDULER, target / SCHEDULER):
        shift = export.shift or FLOW_SHIFT
        diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        ).save_pretrained(target / SCHEDULER)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(target / "tokenizer"))
    name = type(tokenizer).__name__
    # The same class in transformers 5; in 4 the plain name is the slow one's.
    fast = f"{name}Fast" if hasattr(transformers, f"{name}Fast") else name
    index["tokenizer"] = ["transformers", fast]
    if source.wan_config().reads_clip:
        index["_class_name"] = "WanImageToVideoPipeline"
        index["image_encoder"] = ["transformers", "CLIPVisionModel"]
        index["image_processor"] = ["transformers", "CLIPImageProcessor"]
        if not copy_if_there(source.path / IMAGE_PROCESSOR, target / IMAGE_PROCESSOR):
            _write_image_processor(target)
    if not copy_if_there(source.path / MODEL_INDEX, target / MODEL_INDEX):
        _write_json(target / MODEL_INDEX, index)


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
