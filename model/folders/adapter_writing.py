"""Adapters written as files of other tools: scales folded, alpha = r, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.folders.adapter_files import (
    EXPERT_FILES,
    EXPERTS,
    PEFT_HEADER,
    WHOLE_FILE,
    AdapterFile,
    LowRank,
)
from model.folders.writing import appearing, check_target
from model.wan.adapter_names import LAYOUTS, Layout, kohya_problem, module_names, write_key
from utils.weights import WeightsError, write_weights

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Written:
    """The files of an adapter, and how far each layer's product moved by rounding."""

    files: tuple[Path, ...]
    errors: Mapping[str, float]  # by layer, relative, in the Frobenius norm; 0 in fp32


def check_place(path: Path) -> None:
    """Raise WeightsError or ExistsError unless an adapter may be written to `path`."""
    if path.suffix not in ("", SUFFIX):
        raise WeightsError(f"{path}: adapters are written to a {SUFFIX} file, or to a new folder")
    if path.suffix == "":
        check_target(path)


def file_names(path: Path, factors: Mapping[str, LowRank]) -> list[str]:
    """The files of an adapter at `path`: its own name, or those in the folder that it is."""
    if path.suffix == SUFFIX:
        return [path.name]
    return [EXPERT_FILES.get(side, WHOLE_FILE) for side in _sides(factors)]


def check_layout(adapter: AdapterFile, path: Path, layout: Layout) -> None:
    """Raise WeightsError unless `adapter` can be written to `path` in `layout`. Cheap."""
    if layout not in LAYOUTS:
        raise WeightsError(f"layout {layout!r}: must be one of {', '.join(LAYOUTS)}")
    if not adapter.factors:
        raise WeightsError(f"{adapter.path}: holds no low-rank factors; there is nothing to write")
    if adapter.diffs:
        raise WeightsError(
            f"{adapter.path}: holds whole differences of {len(adapter.diffs)} weights "
            f"({next(iter(adapter.diffs))}, ...), which diffusers drops in silence; merge it into "
            f"its base instead"
        )
    check_place(path)
    sides = _sides(adapter.factors)
    if path.suffix == SUFFIX and sides != [""]:
        raise WeightsError(
            f"{path}: an adapter of two experts is a folder with a file for each; give a folder"
        )
    for side in sides:
        fault = kohya_problem(list(_of_side(adapter.factors, side))) if layout == "kohya" else None
        if fault is not None:
            raise WeightsError(
                f"{adapter.path}: not possible in the kohya layout: {fault}; choose diffusers or "
                f"comfyui"
            )


def write_adapter(
    path: Path,
    factors: Mapping[str, LowRank],
    *,
    layout: Layout = "diffusers",
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
    texts: Mapping[str, str] | None = None,
) -> Written:
    """Write factors to a .safetensors file, or to a folder with a file per expert.

    metadata: of each file's header. texts: more files of a folder, by name. Raises WeightsError
    for what the layout cannot hold, and ExistsError for a folder that is not empty.
    """
    check_layout(AdapterFile(factors, path=path), path, layout)
    header = dict(metadata or {})
    names = file_names(path, factors)
    if path.suffix == SUFFIX:
        _write(path, factors, layout, dtype, header)
    else:
        with appearing(path) as part:
            for name, side in zip(names, _sides(factors), strict=True):
                own = {**header, "expert": side} if side else header
                _write(part / name, _of_side(factors, side), layout, dtype, own)
            for name, text in (texts or {}).items():
                (part / name).write_text(text, encoding="utf-8")
    folder = path.parent if path.suffix == SUFFIX else path
    rounded = {name: _rounding(pair, dtype) for name, pair in factors.items()}
    return Written(tuple(folder / name for name in names), rounded)


def _write(
    path: Path,
    factors: Mapping[str, LowRank],
    layout: Layout,
    dtype: torch.dtype,
    header: Mapping[str, str],
) -> None:
    tensors = dict(_tensors(factors, layout, dtype))
    if layout == "diffusers":
        header = {**header, PEFT_HEADER: json.dumps(_peft_settings(factors), sort_keys=True)}
    write_weights(tensors, path, header)


def _tensors(
    factors: Mapping[str, LowRank], layout: Layout, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for layer, (a, b) in factors.items():
        yield write_key(layer, "a", layout), a.to(dtype)
        yield write_key(layer, "b", layout), b.to(dtype)
        if layout == "kohya":  # whose readers want it; in other layouts it makes diffusers raise
            yield write_key(layer, "alpha", layout), torch.tensor(float(len(a)))


def _peft_settings(factors: Mapping[str, LowRank]) -> dict[str, object]:
    """PEFT's settings for these factors: alpha = r, layer by layer where ranks differ.

    Those of the CLIP branch are named with the text's, whose ranks diffusers gives to the zeros
    that it puts there if the model has that branch and the file has not.
    """
    ranks = {module_names(layer)[0]: pair.rank for layer, pair in factors.items()}
    for name, rank in list(ranks.items()):
        if name.endswith("attn2.to_k"):
            for added in ("add_k_proj", "add_v_proj"):
                ranks.setdefault(name.removesuffix("to_k") + added, rank)
    usual = max(ranks.values())
    other = {name: rank for name, rank in ranks.items() if rank != usual}
    settings: dict[str, object] = {
        "r": usual,
        "lora_alpha": usual,
        "target_modules": sorted(ranks),
        "rank_pattern": other,
        "alpha_pattern": other,
    }
    return {f"transformer.{key}": value for key, value in settings.items()}


def _sides(factors: Mapping[str, LowRank]) -> list[str]:
    """The experts that layers are of; "" for those of a model with one network."""
    found = {name.partition(".")[0] for name in factors}
    return [side for side in EXPERTS if side in found] or [""]


def _of_side(factors: Mapping[str, LowRank], side: str) -> dict[str, LowRank]:
    prefix = f"{side}." if side else ""
    return {n.removeprefix(prefix): pair for n, pair in factors.items() if n.startswith(prefix)}


def _rounding(pair: LowRank, dtype: torch.dtype) -> float:
    """How far b a moves by rounding its factors, relative, in the Frobenius norm.

    By the Gram matrices of the factors, so that no product is ever formed.
    """
    if dtype == torch.float32:
        return 0.0
    a, b = (value.double() for value in pair)
    a_, b_ = (value.to(dtype).double() for value in pair)
    norm = ((b.T @ b) * (a @ a.T)).sum()
    # b a - b_ a_ = b (a - a_) + (b - b_) a_: small terms, so that nothing cancels.
    left, right = torch.cat([b, b - b_], dim=1), torch.cat([a - a_, a_])
    moved = ((left.T @ left) * (right @ right.T)).sum()
    return float((moved.clamp(min=0) / norm).sqrt()) if norm > 0 else 0.0
