"""How a student is sampled and what it was made from: what is told beside every export of one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from model.families.base import Model
from model.families.registry import find_model
from pipeline.build import ADJUSTABLE
from trainer.config import (
    Config,
    causal_config,
    method_name,
    method_needs,
    read_run,
    sigmas,
)
from utils.errors import UserError
from utils.hashes import content_hash
from utils.records import DamagedError, from_json, read_mapping

RECORD = (
    "fewstep.json"  # in a folder that is exported; beside a file it begins with the file's stem
)
RUN_CONFIG = "config.yaml"  # in a training checkpoint
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
    cfg_scale: float = 1.0  # 1 = no guidance; of two experts the high one's
    cfg_scale_low: float | None = None  # the low one's; None = the same
    boundary: float | None = None  # of two experts, strictly between two of the sigmas
    causal: bool = False
    images: bool = False  # clips begin with an image
    height: int | None = None
    width: int | None = None
    frames: int | None = None  # pixel frames
    fps: float = 16.0
    base_sha256: str | None = None  # of its weight file, or of the index of its shards
    licence: str = LICENCE

    def header(self) -> dict[str, str]:
        """As a weight file's header holds them: JSON values, but texts as they are."""
        return {k: v if isinstance(v, str) else json.dumps(v) for k, v in asdict(self).items()}


_NAMES = [f.name for f in fields(Facts)]


def from_header(header: Mapping[str, str]) -> Facts | None:
    """What `Facts.header` gave; None = the header tells of no student of ours."""
    values: dict[str, Any] = {}
    for name in (name for name in _NAMES if name in header):
        try:
            values[name] = json.loads(header[name])
        except ValueError:
            values[name] = header[name]
    try:
        return from_json(values, Facts)
    except DamagedError:
        return None


def between_steps(sigmas: list[float], boundary: float) -> float:
    """The same division of the steps as `boundary` makes, by a level that none of them is at.

    The middle between the last step above the boundary and the next one, which may lie on it: that
    one is the low expert's, whatever another program says of a tie.
    """
    above = [sigma for sigma in sigmas if sigma > boundary]
    below = [sigma for sigma in sigmas if sigma <= boundary]
    return (min(above) + max(below)) / 2 if above and below else boundary


def facts_of_run(config: Config) -> Facts:
    """Those of a run's generator; what only its model could tell is left out if it is not here."""
    name = config.model_of("generator")
    model: Model | None
    try:
        model = find_model(Path(config.model_root), name)
        told: dict[str, Any] = _of_model(config, model)
    except (UserError, OSError):
        model, told = None, {}
    many, levels = config.sampling, sigmas(config)
    told |= {"base": Path(name).name, "method": method_name(config)}
    told["causal"] = causal_config(config) is not None
    boundary = many.boundary
    if boundary is None and model is not None and model.experts is not None:
        boundary = model.experts.boundary
    if method_needs(config).sampler in ADJUSTABLE:
        return Facts(
            **told,
            sampler=many.solver,
            steps=many.steps,
            shift=many.timestep_shift,
            cfg_scale=many.cfg_scale,
            cfg_scale_low=many.cfg_scale_low,
            boundary=boundary,
        )
    return Facts(
        **told,
        sampler="euler" if method_needs(config).sampler == "few_step_euler" else "renoise",
        steps=len(levels),
        shift=config.timestep_shift,
        sigmas=levels,
        boundary=None if boundary is None else between_steps(levels, boundary),
    )


def _of_model(config: Config, model: Model) -> dict[str, Any]:
    """What a model's folder tells of its clips and itself."""
    _, frames, rows, columns = config.latent_shape
    height, width = model.latent.pixel_size(rows, columns)
    own = config.generator.weights
    weights = model.find_weights(None if own is None else Path(own)).path
    return {
        "images": model.images is not None and model.images.required,
        "height": height,
        "width": width,
        "frames": model.latent.pixel_frames(frames),
        "fps": model.fps,
        "base_sha256": content_hash(weights) if weights.is_file() else None,
    }


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
