"""Sizes of Wan transformers: official and diffusers config.json files, and the presets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from utils.errors import UserError

# Images that a model of each type is given beside the noisy latents.
IMAGE_COUNT = {"t2v": 0, "ti2v": 0, "i2v": 1, "flf2v": 2}
GIVEN_CHANNELS = 20  # beside those latents: of a mask, and of given frames
TI2V_CHANNELS = 48  # of TI2V-5B's latents; no other release has as many


@dataclass(frozen=True)
class WanConfig:
    """One transformer's architecture, under the names of an official release's config.json."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    # t2v, i2v (given the first frame), flf2v (first and last), or ti2v (whose first latent frame
    # may be an image's).
    model_type: str = "t2v"
    in_dim: int = 16  # latent channels, plus 20 of mask and given frames for i2v and flf2v
    out_dim: int = 16
    freq_dim: int = 256
    text_len: int = 512
    text_dim: int = 4096
    image_dim: int = 1280
    image_tokens: int = 257  # CLIP states per image
    eps: float = 1e-6
    patch_size: tuple[int, int, int] = (1, 2, 2)
    absolute_positions: bool = False  # append ten coordinate channels to the input (tiny models)
    # Whether CLIP states of the given images are read too; Wan2.2's i2v models read none, of which
    # an official config.json says nothing.
    clip: bool = True

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads

    @property
    def image_count(self) -> int:
        """How many images a video is given: 0, 1 (first frame) or 2 (first and last)."""
        return IMAGE_COUNT[self.model_type]

    @property
    def given_latents(self) -> bool:
        """Whether a mask and the latents of given frames lie beside the noisy ones."""
        return self.image_count > 0

    @property
    def reads_clip(self) -> bool:
        """Whether the transformer reads CLIP states of images beside the text."""
        return self.given_latents and self.clip

    def problems(self) -> list[str]:
        """What is impossible about these sizes, one sentence each."""
        found = self._no_sizes()
        if found:
            return found
        if type(self.eps) not in (int, float) or not 0.0 < self.eps < 1.0:
            return [f"eps must be a number between 0 and 1, got {self.eps!r}"]
        for name in ("absolute_positions", "clip"):
            if type(getattr(self, name)) is not bool:
                return [f"{name} must be true or false, got {getattr(self, name)!r}"]
        if self.model_type not in tuple(IMAGE_COUNT):
            return [f"model_type must be t2v, ti2v, i2v or flf2v, got {self.model_type!r}"]
        if not self.clip and self.model_type != "i2v":
            found.append(f"clip must be true unless model_type is i2v, got {self.model_type!r}")
        if self.dim % self.num_heads or self.head_dim % 2:
            found.append(
                f"num_heads={self.num_heads} must divide dim={self.dim} into heads of even width"
            )
        if self.patch_size[0] != 1:
            found.append(f"patch_size must not span frames, got {self.patch_size}")
        if self.freq_dim % 2:
            found.append(f"freq_dim must be even, got {self.freq_dim}")
        extra = GIVEN_CHANNELS * self.given_latents + 10 * self.absolute_positions
        if self.in_dim != self.out_dim + extra:
            found.append(f"in_dim must be out_dim + {extra}, got {self.in_dim} and {self.out_dim}")
        return found

    def _no_sizes(self) -> list[str]:
        sizes: dict[str, object] = {name: getattr(self, name) for name in _SIZES}
        patch = self.patch_size if isinstance(self.patch_size, tuple) else (self.patch_size,)
        sizes |= {f"patch_size[{i}]": size for i, size in enumerate(patch)}
        found = [
            f"{name} must be a whole number above 0, got {size!r}"
            for name, size in sizes.items()
            if type(size) is not int or size < 1
        ]
        if len(patch) != 3:
            found.append(f"patch_size must be three numbers, got {self.patch_size}")
        return found


_SIZES = (
    "dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "freq_dim", "text_len",
    "text_dim", "image_dim", "image_tokens",
)  # fmt: skip

_SMALL = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
_LARGE = WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
_TINY = WanConfig(
    dim=128,
    ffn_dim=512,
    num_heads=4,
    num_layers=4,
    in_dim=26,
    freq_dim=64,
    text_len=12,
    text_dim=64,
    absolute_positions=True,
)
_SMALL22 = WanConfig(
    dim=3072,
    ffn_dim=14336,
    num_heads=24,
    num_layers=30,
    model_type="ti2v",
    in_dim=TI2V_CHANNELS,
    out_dim=TI2V_CHANNELS,
)

PRESETS = {
    "Wan2.1-T2V-1.3B": _SMALL,
    "Wan2.1-T2V-14B": _LARGE,
    "Wan2.1-I2V-14B": replace(_LARGE, model_type="i2v", in_dim=36),
    "Wan2.1-FLF2V-14B": replace(_LARGE, model_type="flf2v", in_dim=36),
    "Wan2.2-TI2V-5B": _SMALL22,
    "Wan2.2-T2V-A14B": _LARGE,  # of each expert
    "Wan2.2-I2V-A14B": replace(_LARGE, model_type="i2v", in_dim=36, clip=False),
    "Wan2.1-T2V-Tiny": _TINY,
    "Wan2.1-I2V-Tiny": replace(_TINY, model_type="i2v", in_dim=46, image_dim=80, image_tokens=5),
    # A latent pixel to a token: with Wan's patches a frame of the tiny world would be one token.
    "Wan2.2-TI2V-Tiny": replace(
        _TINY, model_type="ti2v", in_dim=58, out_dim=TI2V_CHANNELS, patch_size=(1, 1, 1)
    ),
    "Wan2.2-T2V-A14B-Tiny": _TINY,
    "Wan2.2-I2V-A14B-Tiny": replace(_TINY, model_type="i2v", in_dim=46, clip=False),
}


# What configs may say of choices that all Wan2.1 transformers share.
_FIXED: dict[str, object] = {"qk_norm": True, "cross_attn_norm": True, "window_size": [-1, -1]}
_FIXED_DIFFUSERS: dict[str, object] = {
    "qk_norm": "rms_norm_across_heads",
    "cross_attn_norm": True,
}

# Fields of diffusers' configs under our names. It has none of the last two, which we add where
# they are not its constants; it ignores what it does not know.
_DIFFUSERS_NAMES = {
    "num_heads": "num_attention_heads",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "ffn_dim": "ffn_dim",
    "num_layers": "num_layers",
    "freq_dim": "freq_dim",
    "text_dim": "text_dim",
    "image_dim": "image_dim",
    "eps": "eps",
    "patch_size": "patch_size",
    "text_len": "text_len",
    "image_tokens": "image_tokens",
}
_DIFFUSERS_CONSTANTS = {"text_len": 512, "image_tokens": 257}


def read_wan_config(path: Path) -> WanConfig:
    """Read an official config.json, or that of a transformer in diffusers' layout.

    Raises ValueError that names the file and the bad field.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold a JSON object, got {type(values).__name__}")
    values = {key: value for key, value in values.items() if not key.startswith("_")}
    try:
        config = _from_diffusers(values) if "num_attention_heads" in values else _official(values)
        problems = config.problems()
    except ValueError as error:
        problems = [str(error)]
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")
    return config


def _official(values: dict[str, Any]) -> WanConfig:
    required = {"dim", "ffn_dim", "num_heads", "num_layers"}
    _check_fields(values, {field.name for field in fields(WanConfig)}, required, _FIXED)
    return _build({key: value for key, value in values.items() if key not in _FIXED})


def _from_diffusers(values: dict[str, Any]) -> WanConfig:
    """A WanTransformer3DModel's sizes; its model type follows from its channels and images."""
    derived = {"attention_head_dim", "added_kv_proj_dim", "pos_embed_seq_len", "rope_max_seq_len"}
    required = {"num_attention_heads", "attention_head_dim", "ffn_dim", "num_layers"}
    known = derived.union(_DIFFUSERS_NAMES.values(), {"model_type"})
    _check_fields(values, known, required, _FIXED_DIFFUSERS)
    heads, width = values["num_attention_heads"], values["attention_head_dim"]
    if type(heads) is not int or type(width) is not int:
        raise UserError(
            f"num_attention_heads and attention_head_dim must be whole numbers, "
            f"got {heads!r} and {width!r}"
        )
    if claims_clip(values):
        values = {**values, "image_dim": None, "added_kv_proj_dim": None}
    sizes = {
        ours: values[theirs]
        for ours, theirs in _DIFFUSERS_NAMES.items()
        if values.get(theirs) is not None
    }
    kind = _diffusers_kind(values, heads * width)
    if kind == "flf2v":
        sizes["image_tokens"] = values["pos_embed_seq_len"] // 2
    clip = kind != "i2v" or "image_dim" in sizes
    return _build({**sizes, "dim": heads * width, "model_type": kind, "clip": clip})


def claims_clip(values: dict[str, Any]) -> bool:
    """Whether diffusers' sizes speak of a CLIP branch that the weights have not.

    A published early copy of TI2V-5B does, where no images lie beside the noisy latents.
    """
    channels = values.get("in_channels"), values.get("out_channels")
    return channels == (TI2V_CHANNELS, TI2V_CHANNELS) and values.get("image_dim") is not None


def _diffusers_kind(values: dict[str, Any], dim: int) -> str:
    """The model type of a WanTransformer3DModel as wide as `dim`. Raises UserError."""
    added, positions = values.get("added_kv_proj_dim"), values.get("pos_embed_seq_len")
    clip = values.get("image_dim") is not None
    if added != (dim if clip else None):
        raise UserError(
            f"added_kv_proj_dim must be {dim} with an image_dim, and null without, "
            f"got {added!r} with {values.get('image_dim')!r}"
        )
    if positions is not None and (not clip or type(positions) is not int or positions % 2):
        raise UserError(
            f"pos_embed_seq_len must be an even number, of the tokens of two images, "
            f"and needs an image_dim, got {positions!r}"
        )
    if clip:
        return "i2v" if positions is None else "flf2v"
    if isinstance(values.get("model_type"), str):  # ours, where nothing else tells
        return str(values["model_type"])
    inside, outside = (values.get(f"{way}_channels", 16) for way in ("in", "out"))
    if outside == TI2V_CHANNELS:
        return "ti2v"
    return "t2v" if inside == outside else "i2v"


def diffusers_config(config: WanConfig) -> dict[str, Any]:
    """The config.json of diffusers' WanTransformer3DModel; `read_wan_config` gives `config` back.

    Raises ValueError for a transformer that diffusers cannot hold.
    """
    if config.absolute_positions:
        raise UserError("diffusers has no transformer with absolute positions (the tiny models)")
    if config.reads_clip and config.text_len != _DIFFUSERS_CONSTANTS["text_len"]:
        raise UserError(
            f"text_len={config.text_len}: diffusers' image-to-video transformers count on "
            f"{_DIFFUSERS_CONSTANTS['text_len']} rows of text"
        )
    sizes = asdict(config)
    values = {theirs: sizes[ours] for ours, theirs in _DIFFUSERS_NAMES.items()}
    for name, constant in _DIFFUSERS_CONSTANTS.items():
        unread = not config.reads_clip or config.image_count == 2  # said by another field
        if values[name] == constant or (name == "image_tokens" and unread):
            del values[name]
    if config.model_type == "ti2v" and config.out_dim != TI2V_CHANNELS:
        values["model_type"] = config.model_type
    two_images = config.image_count == 2
    return {
        "_class_name": "WanTransformer3DModel",
        **values,
        **_FIXED_DIFFUSERS,
        "attention_head_dim": config.head_dim,
        "rope_max_seq_len": 1024,
        "image_dim": config.image_dim if config.reads_clip else None,
        "added_kv_proj_dim": config.dim if config.reads_clip else None,
        "pos_embed_seq_len": 2 * config.image_tokens if two_images else None,
    }


def _check_fields(
    values: dict[str, Any], known: set[str], required: set[str], fixed: dict[str, object]
) -> None:
    """Raise ValueError that names fields which are unknown, missing, or of another architecture."""
    known = known | fixed.keys()
    unknown, missing = sorted(values.keys() - known), sorted(required - values.keys())
    if unknown or missing:
        raise UserError(
            f"not a Wan transformer's config: missing {missing}, unknown {unknown}; "
            f"known fields are {', '.join(sorted(known))}"
        )
    for name in sorted(fixed.keys() & values.keys()):
        if values[name] != fixed[name]:
            raise UserError(f"{name} must be {fixed[name]!r} in Wan2.1, got {values[name]!r}")


def _build(values: dict[str, Any]) -> WanConfig:
    if isinstance(values.get("patch_size"), list):
        values = {**values, "patch_size": tuple(values["patch_size"])}
    return WanConfig(**values)


def write_wan_config(
    config: WanConfig, path: Path, private: Mapping[str, object] | None = None
) -> None:
    """Write `config` as an official config.json.

    private: fields that begin with an underscore, which readers of sizes pass over.
    """
    values = {"_class_name": "WanModel", **(private or {}), **asdict(config)}
    if config.clip:  # what official files mean that say nothing
        del values["clip"]
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
