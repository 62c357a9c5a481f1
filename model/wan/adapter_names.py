"""Names in adapter files of Wan transformers: three layouts on one side, official layers on ours.

A layer is a linear module's official name without `.weight`: `blocks.0.self_attn.q`, `head.head`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from model.wan.weights import to_diffusers, to_official

# diffusers: PEFT's, under diffusers' names. comfyui: official names. kohya: musubi-tuner's.
Layout = Literal["diffusers", "comfyui", "kohya"]
LAYOUTS: tuple[Layout, ...] = ("diffusers", "comfyui", "kohya")

# The ten matrices of a block, then those that models with CLIP have beside them.
BLOCK_LAYERS = (
    *(f"{kind}.{part}" for kind in ("self_attn", "cross_attn") for part in "qkvo"),
    "ffn.0",
    "ffn.2",
)
CLIP_LAYERS = ("cross_attn.k_img", "cross_attn.v_img")
EMBEDDING_LAYERS = (
    "time_embedding.0", "time_embedding.2", "time_projection.1", "text_embedding.0",
    "text_embedding.2", "head.head", "img_emb.proj.1", "img_emb.proj.3",
)  # fmt: skip

# Weights that no layout holds as low-rank factors; some files hold their whole differences.
_BLOCK_REST = {
    "norm3.weight", "norm3.bias", "modulation", "self_attn.norm_q.weight",
    "self_attn.norm_k.weight", "cross_attn.norm_q.weight", "cross_attn.norm_k.weight",
    "cross_attn.norm_k_img.weight",
}  # fmt: skip
_REST = {
    "patch_embedding.weight", "patch_embedding.bias", "head.modulation", "img_emb.emb_pos",
    "img_emb.proj.0.weight", "img_emb.proj.0.bias", "img_emb.proj.4.weight", "img_emb.proj.4.bias",
}  # fmt: skip

_OFFICIAL, _KOHYA = "diffusion_model.", "lora_unet_"  # what the keys of a layout begin with
_PEFT = ("base_model.model.", "transformer.")
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_FACTOR = re.compile(r"(.+?)\.lora_(A|B|down|up)(?:\.[\w-]+)?\.(weight|bias)")
_WHOLE = {".diff": ".weight", ".diff_b": ".bias", ".diff_m": ".modulation"}
_OTHER_KINDS = re.compile(r"dora_scale|lora_mid|hada_|lokr_|lora_magnitude_vector|\.oft_|\.glora_")


class Entry(NamedTuple):
    """What one tensor of an adapter file is."""

    kind: Literal["a", "b", "alpha", "bias", "diff"]  # bias: of b, scaled like the factors
    target: str  # a layer; of a diff the weight that it is added to


def layout_of(keys: Iterable[str]) -> Layout:
    """The layout of a file, decided as diffusers does: by any one key, in this order."""
    held = list(keys)
    if any(key.startswith(_OFFICIAL) for key in held):
        return "comfyui"
    return "kohya" if any(_KOHYA in key for key in held) else "diffusers"


def other_kind(keys: Iterable[str]) -> str | None:
    """A key that tells of an adapter which is not a sum of low-rank products (DoRA, LoHa, ...)."""
    return next((key for key in keys if _OTHER_KINDS.search(key)), None)


def read_key(key: str, layout: Layout) -> Entry | None:
    """What the tensor `key` is; None for what no file of `layout` holds."""
    if factor := _FACTOR.fullmatch(key):
        layer = _layer(factor[1], layout)
        bias, first = factor[3] == "bias", factor[2] in ("A", "down")
        if layer is None or not is_layer(layer) or (bias and first):
            return None
        return Entry("bias" if bias else "a" if first else "b", layer)
    stem, dot, suffix = key.rpartition(".")
    target = _layer(stem, layout)
    if target is None:
        return None
    if suffix == "alpha":
        return Entry("alpha", target) if is_layer(target) else None
    weight = target + _WHOLE.get(dot + suffix, "")
    return Entry("diff", weight) if dot + suffix in _WHOLE and _is_weight(weight) else None


def write_key(layer: str, kind: Literal["a", "b", "alpha"], layout: Layout) -> str:
    """The name of one tensor of `layer` in a file of `layout`."""
    peft = {"a": "lora_A.weight", "b": "lora_B.weight", "alpha": "alpha"}[kind]
    kohya = {"a": "lora_down.weight", "b": "lora_up.weight", "alpha": "alpha"}[kind]
    if layout == "diffusers":
        return f"transformer.{to_diffusers(layer)}.{peft}"
    if layout == "comfyui":
        return f"{_OFFICIAL}{layer}.{kohya}"
    return f"{_KOHYA}{layer.replace('.', '_')}.{kohya}"


def is_layer(name: str) -> bool:
    """Whether adapters of this kind reach into the layer of this name, in some layout."""
    block = _BLOCK.fullmatch(name)
    return block[2] in (*BLOCK_LAYERS, *CLIP_LAYERS) if block else name in EMBEDDING_LAYERS


def holds(layout: str, layer: str) -> bool:
    """Whether files of `layout` can hold this layer."""
    return layout != "kohya" or layer.startswith("blocks.")


def module_names(layer: str) -> tuple[str, str]:
    """What diffusers and the official release call a layer's module."""
    return to_diffusers(layer), layer


def kohya_problem(layers: Sequence[str]) -> str | None:
    """Why no kohya file of these layers would load elsewhere; None = it would.

    diffusers wants all ten matrices of every block from 0 on, and nothing beside blocks.
    """
    beside = [layer for layer in layers if not layer.startswith("blocks.")]
    if beside:
        return f"its names reach into blocks alone, and there is {beside[0]}"
    count = 1 + max((block_of(layer) for layer in layers), default=-1)
    wanted = [f"blocks.{i}.{name}" for i in range(count) for name in BLOCK_LAYERS]
    absent = sorted(set(wanted) - set(layers))
    if absent:
        return f"it needs all ten matrices of every block, and {absent[0]} is missing"
    return None


def block_of(layer: str) -> int:
    """The number of the block that a layer is in; -1 = in none."""
    found = _BLOCK.fullmatch(layer)
    return int(found[1]) if found else -1


def nearest(key: str, layout: Layout) -> str | None:
    """The known name that looks most like an unknown one."""
    number = next(iter(re.findall(r"blocks[._](\d+)", key)), "0")
    layers = [f"blocks.{number}.{name}" for name in (*BLOCK_LAYERS, *CLIP_LAYERS)]
    layers += EMBEDDING_LAYERS if layout != "kohya" else ()
    known = [write_key(layer, kind, layout) for layer in layers for kind in ("a", "b")]
    return next(iter(difflib.get_close_matches(key, known, n=1, cutoff=0.5)), None)


def _layer(stem: str, layout: Layout) -> str | None:
    """The official name behind a key's stem; None if it is not of this layout."""
    if layout == "comfyui":
        return stem.removeprefix(_OFFICIAL) if stem.startswith(_OFFICIAL) else None
    if layout == "kohya":
        found = re.fullmatch(rf"{_KOHYA}blocks_(\d+)_(.+)", stem)
        names = {name.replace(".", "_"): name for name in (*BLOCK_LAYERS, *CLIP_LAYERS)}
        return f"blocks.{found[1]}.{names[found[2]]}" if found and found[2] in names else None
    for prefix in _PEFT:
        stem = stem.removeprefix(prefix)
    return to_official(stem)


def _is_weight(name: str) -> bool:
    if is_layer(name.removesuffix(".weight").removesuffix(".bias")):
        return name.endswith((".weight", ".bias"))
    block = _BLOCK.fullmatch(name)
    return block[2] in _BLOCK_REST if block else name in _REST
