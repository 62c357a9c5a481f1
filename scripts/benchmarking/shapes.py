"""What is timed: sizes with random weights, from a toy to the released ones; nothing is fetched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import nn

from model.wan.config import PRESETS, WanConfig
from scripts.make_tiny_world import make_folder
from trainer.config import Config, load
from trainer.run import Run, resolve
from utils.config import ConfigError
from utils.seeding import generator
from utils.shipped import ROOT
from utils.tiny_world.world import captions
from utils.weights import fill_weights

MODEL = "benchmark"  # the model folder's name
PROMPTS = 4  # so few that the warm-up encodes them all: a prompt is encoded once per run
METHODS = {"dmd": "dmd.yaml", "self_forcing_dmd": "self_forcing_dmd.yaml"}


@dataclass(frozen=True)
class Shape:
    """A transformer, its latents, and how many of them a step has."""

    sizes: WanConfig
    latent: tuple[int, int, int, int]  # [C, F, H, W]
    block: int  # frames per block of a causal model, after a first one alone where none is left
    batch: int  # samples per rank and step
    folder: str = "configs/tiny"  # of the configurations that it is trained by
    settings: tuple[str, ...] = ()
    real: bool = False  # of a released size: nothing for a CPU


# Wide enough that matrix products, not Python, take the time of a step.
_SMALL = WanConfig(
    dim=512, ffn_dim=2048, num_heads=8, num_layers=11, in_dim=26, freq_dim=64, text_len=12,
    text_dim=64, absolute_positions=True,
)  # fmt: skip
_ADAM = ("generator.muon_lr=null", "critic.muon_lr=null")
_VIDEO = (16, 21, 60, 104)  # 81 frames of 480 x 832
_REAL = ("teacher.weights=null", "teacher.model=null", "generator.weights=null")
SHAPES = {
    "tiny": Shape(PRESETS["Wan2.1-T2V-Tiny"], (16, 5, 4, 4), 2, 32),
    "small": Shape(_SMALL, (16, 5, 8, 8), 2, 4, settings=_ADAM),
    "1.3B": Shape(PRESETS["Wan2.1-T2V-1.3B"], _VIDEO, 3, 1, "configs", _REAL, real=True),
    "14B": Shape(PRESETS["Wan2.1-T2V-14B"], _VIDEO, 3, 1, "configs", _REAL, real=True),
}


@dataclass(frozen=True, eq=False)
class RandomRun(Run):
    """A run whose networks all begin with random weights, the teacher's too."""

    def random_init(self, role: str) -> bool:
        """Every role does."""
        return True


def random_run(config: Config, roles: Sequence[str] | None = None) -> RandomRun:
    """What `config` means, with random weights in the place of those that it names."""
    run = resolve(config, roles)
    return RandomRun(**{field.name: getattr(run, field.name) for field in fields(run)})


def check_device(names: Sequence[str], device: torch.device, *, force: bool) -> None:
    """Raise ConfigError for shapes that would keep a CPU busy for hours."""
    large = [name for name in names if SHAPES[name].real]
    if large and device.type == "cpu" and not force:
        small = " ".join(name for name in SHAPES if not SHAPES[name].real)
        raise ConfigError(
            f"--shape: {', '.join(large)} at 480 x 832 x 81 takes hours a step on a CPU, and more "
            f"memory than most have; use --shape {small}, a CUDA device, or --force"
        )


def make_world(name: str, folder: Path) -> None:
    """Write a model folder without transformer weights, and prompts, below `folder`."""
    make_folder(folder / MODEL, sizes=SHAPES[name].sizes)
    lines = [f"{caption}\n" for caption in captions()[:PROMPTS]]
    (folder / "prompts.txt").write_text("".join(lines), encoding="utf-8")


def shape_config(
    name: str, method: str, folder: Path, *, ranks: int, overrides: Sequence[str] = ()
) -> Config:
    """The configuration of a shape whose world lies in `folder`; both phases in every step."""
    shape = SHAPES[name]
    settings = [
        f"model_root={folder}",
        f"generator.model={MODEL}",
        f"critic.model={MODEL}",
        f"data.path={folder / 'prompts.txt'}",
        f"latent_shape={list(shape.latent)}".replace(" ", ""),
        f"batch_size={shape.batch * ranks}",
        "accumulation=1",
        "loss.generator_every=1",
        "ema.start_step=0",
        "validation.every=0",
        "logging.wandb=false",
        *shape.settings,
    ]
    if method != "dmd":
        alone = shape.latent[1] % shape.block == 1
        settings += [
            f"causal.num_frame_per_block={shape.block}",
            f"causal.independent_first_frame={str(alone).lower()}",
        ]
    return load(ROOT / shape.folder / METHODS[method], [*settings, *overrides])


def make_heads_differ(role: str, network: nn.Module) -> None:
    """Give a fresh network an output: a head of zeros would leave its backward pass all zeros."""
    head = network.get_submodule("model.head.head")
    fill_weights(
        head,
        lambda name, shape: (
            torch.randn(shape, generator=generator("head", role, name)) / shape[-1] ** 0.5
        ),
    )
