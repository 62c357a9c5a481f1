"""Low-rank adapters as files: read from every layout in use, written whole or not at all.

Letters: r rank, in and out as of a linear layer with weight [out, in].
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from model.folders.foreign import adapter_names
from model.folders.loading import open_any
from model.wan.adapter_names import (
    Entry,
    block_of,
    layout_of,
    module_names,
    nearest,
    other_kind,
    read_key,
)
from model.wan.heads import BIAS, WEIGHT
from utils.weights import Weights, WeightsError

EXPERTS = ("high", "low")  # layers of two-expert models begin with one of these and a dot
EXPERT_FILES = {"high": "high_noise_model.safetensors", "low": "low_noise_model.safetensors"}
WHOLE_FILE = "pytorch_lora_weights.safetensors"  # as diffusers looks for one in a folder
PEFT_HEADER = "lora_adapter_metadata"  # PEFT's settings as JSON, in a file's header
PEFT_STEM, PEFT_CONFIG = "adapter_model", "adapter_config.json"  # of PEFT's own folders
_PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ScaleOf = Callable[[str, int], float]  # of a layer, by its rank
_TRAINED = re.compile(r"(.+)\.adapters\.([^.]+)\.(a|b)")  # in a training checkpoint


class LowRank(NamedTuple):
    """The factors of one layer, fp32: it computes b (a x) beside its own product."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r]; whatever scales it is folded in

    @property
    def rank(self) -> int:
        """The rows of `a`."""
        return len(self.a)

    def delta(self) -> Tensor:
        """What is added to the layer's weight [out, in], fp32."""
        return self.b @ self.a


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """What an adapter adds to a base, under official names; scales are folded into the factors."""

    factors: Mapping[str, LowRank]  # by layer, such as blocks.0.self_attn.q
    diffs: Mapping[str, Tensor] = field(default_factory=dict)  # by weight: added to it whole, fp32
    metadata: Mapping[str, str] = field(default_factory=dict)  # of the file's header
    path: Path = Path()
    # Of a student with a head for each part of its path: all of them, which it was trained with.
    heads: Mapping[str, Tensor] = field(default_factory=dict)

    def scaled(self, strength: float) -> AdapterFile:
        """The same with everything times `strength`. Raises WeightsError if that means nothing."""
        if self.heads:
            raise WeightsError(
                f"{self.path}: strength {strength:g}: was trained with heads for the parts of a "
                f"path, which are as they are; leave the strength out"
            )
        factors = {name: LowRank(a, b * strength) for name, (a, b) in self.factors.items()}
        diffs = {name: value * strength for name, value in self.diffs.items()}
        return AdapterFile(factors, diffs, self.metadata, self.path)

    def of_expert(self, side: str) -> AdapterFile:
        """The same for one expert of a two-expert model, under names that say so.

        Of an adapter for both experts, that expert's part.
        """
        both = any(name.startswith(tuple(f"{s}." for s in EXPERTS)) for name in self.shapes())
        factors, diffs = dict(self.factors), dict(self.diffs)
        if both:
            factors = {n: v for n, v in factors.items() if n.startswith(f"{side}.")}
            diffs = {n: v for n, v in diffs.items() if n.startswith(f"{side}.")}
        else:
            factors = {f"{side}.{n}": v for n, v in factors.items()}
            diffs = {f"{side}.{n}": v for n, v in diffs.items()}
        if not factors and not diffs:
            raise WeightsError(f"{self.path}: holds no adapter of the {side}-noise expert")
        return AdapterFile(factors, diffs, self.metadata, self.path)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each weight that something is added to."""
        products = {f"{n}.weight": (len(b), a.shape[1]) for n, (a, b) in self.factors.items()}
        return products | {name: tuple(value.shape) for name, value in self.diffs.items()}

    def delta(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Rows of what is added to the weight `name`, which is one of `shapes`; fp32."""
        terms = []
        pair = self.factors.get(name.removesuffix(".weight"))
        if pair is not None and name.endswith(".weight"):
            terms.append(pair.b[rows] @ pair.a)
        if name in self.diffs:
            terms.append(self.diffs[name][rows])
        return terms[0] + terms[1] if terms[1:] else terms[0]


def read_adapter(
    path: Path, *, role: str = "generator", averaged: bool | None = None
) -> AdapterFile:
    """The adapter at `path`, on the CPU, fp32.

    A file in any of the layouts; a folder with one, or with one for each of two experts; a
    training checkpoint or log directory of an adapter run, of which `role` is read. averaged: of a
    checkpoint the generator's average; None = if there is one. Raises WeightsError.
    """
    if path.is_dir():
        sides = {side: path / name for side, name in EXPERT_FILES.items()}
        there = {side: file for side, file in sides.items() if file.is_file()}
        if there:
            return _joined(path, {side: _read_file(file) for side, file in there.items()})
        if (path / WHOLE_FILE).is_file():
            return _read_file(path / WHOLE_FILE)
    if path.is_file():
        return _read_file(path, role, averaged)
    weights = open_any(path, None, role=role, averaged=averaged)
    return _trained(weights) or _translated(weights, {})


def is_adapter(path: Path) -> bool:
    """Whether `read_adapter` reads what lies at `path`, as far as its names tell. Cheap."""
    if any((path / name).is_file() for name in (*EXPERT_FILES.values(), WHOLE_FILE)):
        return True
    try:
        return bool(adapter_names(open_any(path, None, role="generator", averaged=None)))
    except WeightsError:
        return False  # a model folder, or nothing that can be read, as others will say


def side_and_layer(name: str) -> tuple[str, str]:
    """The expert that a name of a two-expert model is of, or "", and the name in its network."""
    side, _, rest = name.partition(".")
    return (side, rest) if side in EXPERTS else ("", name)


def check_adapter(adapter: AdapterFile, base: Mapping[str, tuple[int, ...]], *, what: str) -> None:
    """Raise WeightsError unless everything in `adapter` is added to a weight of `base`.

    base: the shapes of its weights under official names. what: names it in messages. Cheap.
    """
    shapes = adapter.shapes()
    absent = [name for name in shapes if name not in base]
    if absent:
        raise WeightsError(f"{adapter.path}: {len(absent)} of its {len(shapes)} weights are not in "
                           f"{what}: {', '.join(absent[:3])}{_why(absent, base)}")  # fmt: skip
    other = [name for name in shapes if shapes[name] != base[name]]
    if other:
        name = other[0]
        raise WeightsError(
            f"{adapter.path}: made for another model than {what}: {len(other)} of its weights have "
            f"another shape ({name} is {list(shapes[name])}, expected {list(base[name])}); give an "
            f"adapter of this model's size"
        )


def _why(absent: list[str], base: Mapping[str, tuple[int, ...]]) -> str:
    """What kind of model weights would need that are not there."""
    if any("_img." in name or "img_emb." in name for name in absent):
        return "; it was made for a model that sees images through CLIP, and this one does not"
    experts = any(name.startswith("high.") for name in base)
    if experts and not any(name.startswith(EXPERTS) for name in absent):
        return "; this model has two experts: say which it is for with high=path or low=path"
    if any(name.startswith(("high.", "low.")) for name in absent):
        return "; it was made for the experts of another model"
    if max(map(block_of, absent)) >= 0:
        return "; it was made for a model with more blocks"
    return ""


# ---- reading


def _read_file(path: Path, role: str = "generator", averaged: bool | None = None) -> AdapterFile:
    weights = open_any(path, None, role=role, averaged=averaged)
    return _trained(weights) or _translated(weights, read_header(path))


def read_header(path: Path) -> dict[str, str]:
    """What an adapter file says of itself; of PEFT's own also what their neighbour says."""
    header: dict[str, str] = {}
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
    settings = path.with_name(PEFT_CONFIG)
    if path.stem == PEFT_STEM and settings.is_file() and PEFT_HEADER not in header:
        header[PEFT_HEADER] = settings.read_text(encoding="utf-8")
    return header


def _joined(path: Path, sides: Mapping[str, AdapterFile]) -> AdapterFile:
    """The adapters of two experts, or of one of them, as one."""
    parts = [adapter.of_expert(side) for side, adapter in sides.items()]
    factors = {name: value for part in parts for name, value in part.factors.items()}
    diffs = {name: value for part in parts for name, value in part.diffs.items()}
    return AdapterFile(factors, diffs, parts[0].metadata, path)


def _trained(weights: Weights) -> AdapterFile | None:
    """The adapter in a training checkpoint; None if `weights` are no such."""
    held = weights.shapes()
    found = {name: _TRAINED.fullmatch(name) for name in held if name not in (WEIGHT, BIAS)}
    if not found or not all(found.values()):
        return None
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, match in found.items():
        assert match is not None, "looked at above"
        pairs.setdefault(match[1], {})[match[3]] = _value(weights, name)
    heads = {name: _value(weights, name) for name in (WEIGHT, BIAS) if name in held}
    factors = {name: LowRank(**pair) for name, pair in pairs.items()}
    return AdapterFile(factors, path=weights.path, heads=heads)


def refuse_heads(adapter: AdapterFile, *, why: str) -> None:
    """Raise WeightsError if `adapter` was trained with heads for the parts of a path."""
    if adapter.heads:
        raise WeightsError(
            f"{adapter.path}: was trained with {len(adapter.heads[WEIGHT])} heads for the parts of "
            f"a path (method pdd), {why}"
        )


def _translated(weights: Weights, metadata: Mapping[str, str]) -> AdapterFile:
    """The adapter in a file of any tool. Raises WeightsError for what cannot be read."""
    keys = list(weights.shapes())
    entries = _entries(weights.path, keys)
    held: dict[str, dict[str, Tensor]] = {}
    diffs: dict[str, Tensor] = {}
    for key in keys:
        kind, target = entries[key]
        place = diffs if kind == "diff" else held.setdefault(target, {})
        name = target if kind == "diff" else kind
        if name in place:
            raise WeightsError(f"{weights.path}: holds {kind} of {target} twice, again as {key}")
        place[name] = _value(weights, key)
    scale_of = _scales(weights.path, metadata)
    factors = {}
    for layer, parts in held.items():
        factors[layer] = _folded(weights.path, layer, parts, scale_of)
        if "bias" in parts:
            scale = _scale(layer, parts, scale_of)
            diffs[f"{layer}.bias"] = diffs.get(f"{layer}.bias", 0.0) + scale * parts["bias"]
    return AdapterFile(factors, diffs, dict(metadata), weights.path)


def _value(weights: Weights, name: str) -> Tensor:
    value = weights.read(name)
    if value.dtype not in _PLAIN:
        raise WeightsError(
            f"{weights.path}: {name} is {str(value.dtype).removeprefix('torch.')}, a quantised "
            f"format; give an adapter in float32, bfloat16 or float16"
        )
    return value.float()


def _entries(path: Path, keys: Sequence[str]) -> dict[str, Entry]:
    """What each tensor is. Raises WeightsError with three keys that are nothing known."""
    other = other_kind(keys)
    if other is not None:
        raise WeightsError(
            f"{path}: holds {other}, of a kind of adapter that is not a plain product of two "
            f"factors (DoRA, LoHa, LoKr, ...); merge it into its base with its own tool"
        )
    if "patch_embedding.weight" in keys:
        raise WeightsError(
            f"{path}: is a whole network and no adapter; give it as weights, or extract an adapter "
            f"from it and its base with convert_checkpoint.py --extract"
        )
    layout = layout_of(keys)
    entries = {key: read_key(key, layout) for key in keys}
    unknown = [key for key, entry in entries.items() if entry is None]
    if unknown or not keys:
        near = [f"{key} (nearest: {nearest(key, layout)})" for key in unknown[:3]]
        raise WeightsError(
            f"{path}: not an adapter of a Wan transformer: {len(unknown)} of its {len(keys)} names "
            f"are unknown in the {layout} layout: {', '.join(near) or 'it is empty'}; give a LoRA "
            f"in the layout of diffusers, ComfyUI (official names) or kohya"
        )
    return {key: entry for key, entry in entries.items() if entry is not None}


def _folded(path: Path, layer: str, parts: Mapping[str, Tensor], scale_of: ScaleOf) -> LowRank:
    """A layer's factors, its scale folded into b."""
    absent = [kind for kind in ("a", "b") if kind not in parts]
    if absent:
        raise WeightsError(
            f"{path}: {layer} lacks one of its factors (lora_{'A' if absent == ['a'] else 'B'}); "
            f"was the file cut off?"
        )
    a, b = parts["a"], parts["b"]
    if a.ndim != 2 or b.ndim != 2 or b.shape[1] != len(a):
        raise WeightsError(
            f"{path}: the factors of {layer} are {list(a.shape)} and {list(b.shape)}, expected "
            f"[r, in] and [out, r]"
        )
    return LowRank(a, b * _scale(layer, parts, scale_of))


def _scale(layer: str, parts: Mapping[str, Tensor], scale_of: ScaleOf) -> float:
    """alpha / rank, by the layer's own alpha, else by the header; 1 where neither says."""
    rank = len(parts["a"])
    return float(parts["alpha"]) / rank if "alpha" in parts else scale_of(layer, rank)


def _scales(path: Path, metadata: Mapping[str, str]) -> ScaleOf:
    """The scale of a layer of some rank, as a file's header has PEFT's settings."""
    text = metadata.get(PEFT_HEADER)
    if text is None:
        return lambda layer, rank: 1.0
    try:
        held = {k.removeprefix("transformer."): v for k, v in dict(json.loads(text)).items()}
        usual, rooted = held.get("lora_alpha"), bool(held.get("use_rslora", False))
        patterns = {k: float(v) for k, v in (held.get("alpha_pattern") or {}).items()}
        usual = None if usual is None else float(usual)
    except (ValueError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path}: {PEFT_HEADER} is not readable: {error}") from error

    def scale(layer: str, rank: int) -> float:
        names = module_names(layer)
        own = (v for k, v in patterns.items() if any(_matches(k, name) for name in names))
        alpha = next(own, usual)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if rooted else rank)

    return scale


def _matches(pattern: str, name: str) -> bool:
    """Whether PEFT takes a key of its patterns for a module."""
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None
