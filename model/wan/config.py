"""Sizes of Wan2.1 transformers: the fields of an official config.json, and the presets."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class WanConfig:
    """One transformer's architecture, under the names of an official release's config.json."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    model_type: str = "t2v"  # t2v or i2v; i2v adds image tokens to the cross-attention
    in_dim: int = 16  # latent channels, plus 20 of mask and first frame for i2v
    out_dim: int = 16
    freq_dim: int = 256
    text_len: int = 512
    text_dim: int = 4096
    image_dim: int = 1280
    eps: float = 1e-6
    patch_size: tuple[int, int, int] = (1, 2, 2)
    absolute_positions: bool = False  # append ten coordinate channels to the input (tiny models)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads

    def problems(self) -> list[str]:
        """What is impossible about these sizes, one sentence each."""
        found = self._no_sizes()
        if found:
            return found
        if self.model_type not in ("t2v", "i2v"):
            found.append(f"model_type must be t2v or i2v, got '{self.model_type}'")
        if self.dim % self.num_heads or self.head_dim % 2:
            found.append(
                f"num_heads={self.num_heads} must divide dim={self.dim} into heads of even width"
            )
        if self.patch_size[0] != 1:
            found.append(f"patch_size must not span frames, got {self.patch_size}")
        if self.freq_dim % 2:
            found.append(f"freq_dim must be even, got {self.freq_dim}")
        extra = 20 * (self.model_type == "i2v") + 10 * self.absolute_positions
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
    "text_dim", "image_dim",
)  # fmt: skip

PRESETS = {
    "Wan2.1-T2V-1.3B": WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "Wan2.1-T2V-14B": WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
    "Wan2.1-I2V-14B": WanConfig(
        dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, model_type="i2v", in_dim=36
    ),
    "Wan2.1-T2V-Tiny": WanConfig(
        dim=128,
        ffn_dim=512,
        num_heads=4,
        num_layers=4,
        in_dim=26,
        freq_dim=64,
        text_len=12,
        text_dim=64,
        absolute_positions=True,
    ),
}


def read_wan_config(path: Path) -> WanConfig:
    """Read an official config.json. Raises ValueError that names the file and the bad field."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(values).__name__}")
    values = {key: value for key, value in values.items() if not key.startswith("_")}
    known = {field.name for field in fields(WanConfig)}
    unknown = sorted(values.keys() - known)
    missing = sorted({"dim", "ffn_dim", "num_heads", "num_layers"} - values.keys())
    if unknown or missing:
        raise ValueError(
            f"{path}: not a Wan transformer's config: missing {missing}, unknown {unknown}; "
            f"known fields are {', '.join(sorted(known))}"
        )
    if isinstance(values.get("patch_size"), list):
        values["patch_size"] = tuple(values["patch_size"])
    config = WanConfig(**values)
    if config.problems():
        raise ValueError(f"{path}: {'; '.join(config.problems())}")
    return config


def write_wan_config(config: WanConfig, path: Path) -> None:
    """Write `config` as an official config.json."""
    values = {"_class_name": "WanModel", **asdict(config)}
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
