"""How a student is sampled and what it was made from: what is told beside every export of one."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from model.families.registry import find_model
from pipeline.build import ADJUSTABLE
from trainer.config import (
    Config,
    causal_config,
    first_sigmas,
    method_name,
    method_needs,
    read_run,
    sigmas,
)
from trainer.experts import between, open_models
from trainer.run import resolve
from utils.errors import UserError, words
from utils.hashes import content_hash
from utils.records import DamagedError, from_json, read_mapping
from utils.weights import INDEX_SUFFIX

log = logging.getLogger(__name__)

RECORD = (
    "fewstep.json"  # in a folder that is exported; beside a file it begins with the file's stem
)
RUN_CONFIG = "config.yaml"  # in a training checkpoint
_FEW_STEPS: Mapping[str, Literal["renoise", "euler"]] = {
    "few_step": "renoise",
    "few_step_euler": "euler",
    "path_euler": "euler",
}
_EXPERTS = ("*_noise_model", "transformer", "transformer_2")  # folders of two experts
LICENCE = "apache-2.0"  # of all of Wan's releases


@dataclass(frozen=True)
class Facts:
    """How a student's clips are made. Sizes in pixels, noise levels in [0, 1]."""

    base: str  # name of the model that it was trained from, or is added to
    method: str  # by its file in model/
    sampler: Literal["renoise", "euler", "unipc"]  # renoise: predict x0, add fresh noise
    steps: int
    shift: float
    sigmas: list[float] = field(default_factory=list)  # of the steps; of a schedule none
    # Of a causal student's first block, where its steps are others; `sigmas` is of the later ones.
    first_block_sigmas: list[float] | None = None
    cfg_scale: float = 1.0  # 1 = no guidance; of two experts the high one's
    cfg_scale_low: float | None = None  # the low one's; None = the same
    boundary: float | None = None  # of two experts, strictly between two of the sigmas
    expert: Literal["high", "low"] | None = (
        None  # whose student it is; None = both, or there are none
    )
    causal: bool = False
    images: bool = False  # clips begin with an image
    height: int | None = None
    width: int | None = None
    frames: int | None = None  # pixel frames
    fps: float = 16.0
    base_sha256: str | None = None  # of its weight file, or of the index of its shards
    licence: str = LICENCE

    @property
    def head_per_step(self) -> bool:
        """Whether each of its steps has a last layer of its own."""
        return self.method == "pdd"

    def header(self) -> dict[str, str]:
        """As a weight file's header holds them: JSON values, but texts as they are."""
        told = {name: value for name, value in asdict(self).items() if value is not None}
        return {k: v if isinstance(v, str) else json.dumps(v) for k, v in told.items()}


_NAMES = [f.name for f in fields(Facts)]
_TEXTS = ("base", "method", "sampler", "expert", "base_sha256", "licence")


def from_header(header: Mapping[str, str]) -> Facts | None:
    """What `Facts.header` gave; None = the header tells of no student of ours."""
    try:
        values = {
            n: header[n] if n in _TEXTS else json.loads(header[n]) for n in _NAMES if n in header
        }
        return from_json(values, Facts)
    except (DamagedError, ValueError):
        return None


def facts_of_run(config: Config) -> Facts:
    """Those of a run's generator; what only its model could tell is left out if it is not here."""
    kind, levels = method_needs(config).sampler, sigmas(config)
    told: dict[str, Any] = {"base": Path(config.model_of("generator")).name}
    told |= {"method": method_name(config), "causal": causal_config(config) is not None}
    try:
        told |= _of_model(config)
    except (UserError, OSError) as error:
        log.warning("of the model itself the card tells nothing: %s", words(error) or error)
    if kind not in ADJUSTABLE:
        told |= {"sampler": _FEW_STEPS[kind], "shift": config.timestep_shift}
        told |= {"first_block_sigmas": first_sigmas(config)}
        return Facts(**told, steps=len(levels), sigmas=levels)
    many = config.sampling
    return Facts(
        **told,
        sampler=many.solver,
        steps=many.steps,
        shift=many.timestep_shift,
        cfg_scale=many.cfg_scale,
        cfg_scale_low=many.cfg_scale_low,
    )


def _of_model(config: Config) -> dict[str, Any]:
    """What a model's folder tells of its clips, its experts and itself."""
    run, side = resolve(config, ("generator",)), config.generator.experts
    model, boundary = run.model, run.gate
    if side is not None and boundary is None:
        whole = open_models(config, ("generator",), find_model)["generator"].boundary
        few = run.needs.sampler not in ADJUSTABLE
        boundary = between(sigmas(config), whole) if few and whole is not None else whole
    _, frames, rows, columns = config.latent_shape
    height, width = model.latent.pixel_size(rows, columns)
    own = config.generator.weights
    weights = model.find_weights(None if own is None else Path(own)).path
    return {
        "boundary": boundary,
        "expert": side,
        "images": model.images is not None and model.images.required,
        "height": height,
        "width": width,
        "frames": model.latent.pixel_frames(frames),
        "fps": model.fps,
        "base_sha256": _sha256(weights),
    }


def _sha256(weights: Path) -> str | None:
    """Of a weight file or the index of its shards; of two experts' folder, of both of these."""
    if weights.is_file():
        return content_hash(weights)
    for kind in (INDEX_SUFFIX, ".safetensors"):
        files = [f for side in _EXPERTS for f in sorted(weights.glob(f"{side}/*{kind}"))]
        if files:
            lines = [f"{content_hash(file)} {file.relative_to(weights)}\n" for file in files]
            return hashlib.sha256("".join(lines).encode()).hexdigest()
    return None


def known_facts(path: Path, header: Mapping[str, str]) -> Facts | None:
    """What is known of a student: by a run's checkpoint at `path`, by its files, or by `header`.

    Raises ConfigError for a record that is damaged.
    """
    if (path / RUN_CONFIG).is_file() and (path / ".metadata").is_file():
        return facts_of_run(read_run(path / RUN_CONFIG))
    record = path / RECORD if path.is_dir() else record_beside(path)
    if record.is_file():
        found = read_mapping(record, "a record of a student")
        return from_json({k: v for k, v in found.items() if k in _NAMES}, Facts)
    return from_header(header)


def record_beside(file: Path) -> Path:
    """Where the record of an exported file lies."""
    return file.with_name(f"{file.stem}.{RECORD}")
