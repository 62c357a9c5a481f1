"""Write whole model folders, official or diffusers', from a folder of either layout."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from model.encoders.clip import MEAN, STD, read_clip
from model.encoders.clip import to_official as official_clip
from model.encoders.umt5 import TIED, open_umt5
from model.encoders.umt5 import to_official as official_umt5
from model.encoders.vae import open_vae
from model.encoders.vae_names import to_official as official_vae_name
from model.folders.component import CONFIG, STEMS
from model.folders.folder import (
    IMAGE_ENCODER,
    MODEL_INDEX,
    TEXT_ENCODER,
    TOKENIZER,
    ModelFolder,
    check_model,
)
from model.folders.loading import check_weights
from model.wan.config import diffusers_config, write_wan_config
from model.wan.weights import to_diffusers
from utils.errors import ExistsError, UserError
from utils.files import write_text, writing
from utils.tiny_world.codec import FILE_NAME as PATCH_CODEC
from utils.weights import INDEX_SUFFIX, Weights, check_fits, write_weights

LAYOUTS = ("official", "diffusers")
VAE_FILE = "Wan2.1_VAE.pth"
CLIP_TOKENIZER = "xlm-roberta-large"  # nothing here reads it; official code looks for it
CLIP_PREFIX = "vision_model."  # as transformers 4 names its weights; 5 reads them too
FLOW_SHIFT = 3.0  # of the scheduler in diffusers' folders; Wan's own advice for 480p

MODEL_STEM, TRANSFORMERS_STEM = STEMS
SCHEDULER, IMAGE_PROCESSOR = "scheduler", "image_processor"  # folders of diffusers' layout


@dataclass(frozen=True)
class Export:
    """What a model folder is made of, and how it is written."""

    source: ModelFolder  # gives the sizes and all but the transformer's weights
    weights: Weights  # of the transformer, under official names
    layout: str  # official or diffusers
    dtype: torch.dtype | None = None  # of the transformer; None = as stored
    max_shard_bytes: int = 5 * 10**9


def check_export(export: Export, target: Path) -> None:
    """Raise ValueError or OSError that says why `export` cannot be written to `target`. Cheap."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ExistsError(f"{target}: is there already; give a new or an empty folder")
    check_model(export.source, weights=False)
    config = export.source.wan_config()
    check_weights(config, export.weights, what=f"the transformer of {export.source.path}")
    if export.layout == "diffusers":
        try:
            diffusers_config(config)
        except ValueError as error:
            raise UserError(f"{export.source.path}: no folder for diffusers: {error}") from error
        if _present(export.source.vae).name == PATCH_CODEC:
            raise UserError(f"{export.source.vae}: the tiny world's codec is no VAE of diffusers'")


def write_model_folder(export: Export, target: Path) -> None:
    """Write a model folder; it appears whole or not at all.

    The transformer's weights are read and written a shard at a time. Raises what `check_export`
    raises, and WeightsError for parts of the source that are not what their names say.
    """
    check_export(export, target)
    with _appearing(target) as part:
        _write_folder(export, part)


def _write_folder(export: Export, target: Path) -> None:
    source, diffusers = export.source, export.layout == "diffusers"
    # Small parts first: a wrong one is found before gigabytes are written.
    vae = _present(source.vae)
    if vae.name == PATCH_CODEC:
        _copy(vae, target / PATCH_CODEC)
    else:
        _write_part(VAE, vae, target, export)
    if source.wan_config().sees_images:
        _write_part(CLIP, _present(source.image_encoder), target, export)
    _copy(_present(source.tokenizer), target / ("tokenizer" if diffusers else TOKENIZER))
    if diffusers:
        _write_diffusers_extras(source, target)
    else:
        _copy_if_there(source.path / CLIP_TOKENIZER, target / CLIP_TOKENIZER)
    _write_part(UMT5, _present(source.text_encoder), target, export)
    _write_transformer(export, target)


def _present(path: Path | None) -> Path:
    assert path is not None, "check_model comes first"
    return path


def write_shards(
    tensors: Iterable[tuple[str, Tensor]],
    folder: Path,
    stem: str,
    max_bytes: int,
    metadata: Mapping[str, str],
) -> None:
    """Write tensors as they come: one safetensors file, or shards and their index.

    A shard holds at most `max_bytes`, or a single tensor. No more than one is in memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = 0

    def close() -> None:
        write_weights(shard, folder / f"{stem}-{len(shards)}.safetensors", metadata)
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and sum(value.nbytes for value in shard.values()) + tensor.nbytes > max_bytes:
            close()
        shard[name] = tensor
        total += tensor.nbytes
    close()
    if len(shards) == 1:
        (folder / f"{stem}-0.safetensors").rename(folder / f"{stem}.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"{stem}-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{stem}-{number}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_text(folder / f"{stem}{INDEX_SUFFIX}", json.dumps(index, indent=2) + "\n")


@contextlib.contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` that becomes it at the end; what a killed call left goes."""
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        part.replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


# ---- the transformer


def _write_transformer(export: Export, target: Path) -> None:
    config, folder = export.source.wan_config(), target
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
    return _state(*open_vae(path), what="Wan2.1's autoencoder")


def _read_umt5(path: Path) -> tuple[Any, dict[str, Tensor]]:
    return _state(*open_umt5(path), what="a UMT5 encoder")


def _read_clip(path: Path) -> tuple[Any, dict[str, Tensor]]:
    from transformers import CLIPVisionModel  # slow to import

    config, state = read_clip(path)
    with torch.device("meta"):
        return CLIPVisionModel(config), {CLIP_PREFIX + name: v for name, v in state.items()}


def _state(network: Any, weights: Weights, *, what: str) -> tuple[Any, dict[str, Tensor]]:
    check_fits(network, weights, what=what)
    return network, {name: weights.read(name) for name in network.state_dict() if name != TIED}


def _official_vae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {official_vae_name(name): value for name, value in state.items()}


VAE = Part(VAE_FILE, "vae", MODEL_STEM, _read_vae, _official_vae)
UMT5 = Part(TEXT_ENCODER, "text_encoder", TRANSFORMERS_STEM, _read_umt5, official_umt5)
CLIP = Part(IMAGE_ENCODER, "image_encoder", TRANSFORMERS_STEM, _read_clip, official_clip)


def _write_part(part: Part, source: Path, target: Path, export: Export) -> None:
    """Copy a network, or translate it if `source` is of the other layout; bits are kept."""
    diffusers = export.layout == "diffusers"
    wanted = target / (part.folder if diffusers else part.file)
    if source.is_dir() == diffusers:
        _copy(source, wanted)
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


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        try:
            shutil.copytree(source, target)
        except shutil.Error as error:  # one for all files that could not be copied
            (_, file, reason), *_ = error.args[0]
            raise UserError(f"{file}: not written: {reason}") from error
    else:
        with writing(target):
            shutil.copyfile(source, target)


def _copy_if_there(source: Path, target: Path) -> bool:
    if source.exists():
        _copy(source, target)
    return source.exists()


def _write_diffusers_extras(source: ModelFolder, target: Path) -> None:
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
    if not _copy_if_there(source.path / SCHEDULER, target / SCHEDULER):
        diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT
        ).save_pretrained(target / SCHEDULER)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(target / "tokenizer"))
    name = type(tokenizer).__name__
    # The same class in transformers 5; in 4 the plain name is the slow one's.
    fast = f"{name}Fast" if hasattr(transformers, f"{name}Fast") else name
    index["tokenizer"] = ["transformers", fast]
    if source.wan_config().sees_images:
        index["_class_name"] = "WanImageToVideoPipeline"
        index["image_encoder"] = ["transformers", "CLIPVisionModel"]
        index["image_processor"] = ["transformers", "CLIPImageProcessor"]
        if not _copy_if_there(source.path / IMAGE_PROCESSOR, target / IMAGE_PROCESSOR):
            _write_image_processor(target)
    if not _copy_if_there(source.path / MODEL_INDEX, target / MODEL_INDEX):
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
