"""Miniatures that tests share: a whole tiny model folder with data, and tiny transformers."""

from __future__ import annotations

import fcntl
import json
import math
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.experts import SIDES
from model.families.wan21.folder import CONFIG, HOMES, WEIGHTS, weights_in
from model.flow import step_sigmas
from model.wan.config import WanConfig, write_wan_config
from model.wan.transformer import WanTransformer
from scripts.make_tiny_world import (
    EXPERT_NAMES,
    IMAGE_NAME,
    NAME,
    TI2V_LATENTS,
    TI2V_NAME,
    make_data,
    make_folder,
)
from tests.commands import no_weights, own_logging
from tests.runs import CONFIGS, write_config
from utils.data.dataset import TrajectoryManifest
from utils.data.shards import ShardReader, ShardWriter
from utils.records import MANIFEST
from utils.seeding import generator
from utils.tiny_world.codec import FILE_NAME as CODEC
from utils.tiny_world.codec import WAN22, PatchCodec
from utils.tiny_world.world import draw_captions, draw_scenes, render
from utils.weights import fill_weights, write_weights

__all__ = ["no_weights", "own_logging"]  # fixtures of all tests

torch.set_num_threads(1)
# Whoever starts tests in the background may ignore Ctrl-C for them, and their commands inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)

WanFactory = Callable[..., WanTransformer]

# Half the layers and a quarter of the width of the embedded tiny world's transformer.
MINIATURE = WanConfig(
    dim=32,
    ffn_dim=64,
    num_heads=2,
    num_layers=2,
    in_dim=26,
    freq_dim=32,
    text_len=12,
    text_dim=64,
    absolute_positions=True,
)

IMAGE_MINIATURE = replace(MINIATURE, model_type="i2v", in_dim=46, image_dim=80, image_tokens=5)
# Of Wan2.2: one network behind a codec of stride 16; and experts that are given an image.
TI2V_MINIATURE = replace(MINIATURE, model_type="ti2v", in_dim=58, out_dim=48, patch_size=(1, 1, 1))
EXPERT_MINIATURE = replace(MINIATURE, model_type="i2v", in_dim=46, clip=False)


def random_value(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Any weight, of the size that keeps activations near 1; no bias, gate or head is zero."""
    noise = torch.randn(shape, generator=generator(seed, name))
    if len(shape) == 1:
        return 0.1 * noise if name.endswith("bias") else 1.0 + 0.1 * noise
    return noise / math.sqrt(shape[1:].numel())


def build_wan(config: WanConfig = MINIATURE, *, seed: int = 0) -> WanTransformer:
    """A transformer of `config` with weights drawn from `seed`."""
    model = WanTransformer(config)
    fill_weights(model, lambda name, shape: random_value(name, shape, seed))
    return model


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and say so."""
    if not torch.cuda.is_available():
        absent = pytest.mark.skip(reason="needs a CUDA device, and there is none here")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(absent)


@pytest.fixture(scope="session")
def tiny_config() -> WanConfig:
    """Sizes of the miniature transformer."""
    return MINIATURE


@pytest.fixture(scope="session")
def tiny_wan() -> WanFactory:
    """`tiny_wan(config=MINIATURE, *, seed=0)` builds a transformer with random weights."""
    return build_wan


@pytest.fixture(scope="session")
def tiny_root(shared_tmp: Path) -> Path:
    """A folder with wan_models/Wan2.1-T2V-Tiny (miniature, random weights) and data/tiny.

    Wan2.1-I2V-Tiny and Wan2.2-TI2V-Tiny lie beside it. data/tiny/latents holds one LMDB shard of 64
    captioned clips with first frames, latents_16 the same for TI2V, data/tiny/ode_pairs straight
    trajectories to 16 of the former, data/tiny/prompts.txt all captions. Shared by the whole
    session: do not write into it.
    """
    return made_once(shared_tmp, "tiny", make_tiny_root)


@pytest.fixture(scope="session")
def shared_tmp(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Path:
    """A folder that all workers of this session see."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if hasattr(pytestconfig, "workerinput") else base


def made_once(shared: Path, name: str, make: Callable[[Path], None]) -> Path:
    """<shared>/<name>, which the first worker to ask for it makes, and all others read."""
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the file is closed
        if not (shared / name).exists():
            part = shared / f"{name}.part"
            part.mkdir()
            make(part)
            part.rename(shared / name)
    return shared / name


def make_tiny_root(root: Path) -> None:
    """See the fixture tiny_root."""
    folder = root / "wan_models" / NAME
    codec = make_folder(folder)
    write_wan_config(MINIATURE, folder / CONFIG)
    write_weights(build_wan().state_dict(), folder / WEIGHTS[1], {})
    image_folder = root / "wan_models" / IMAGE_NAME
    make_folder(image_folder, IMAGE_NAME, codec=codec)
    write_wan_config(IMAGE_MINIATURE, image_folder / CONFIG)
    write_weights(build_wan(IMAGE_MINIATURE).state_dict(), image_folder / WEIGHTS[1], {})
    both_folder = root / "wan_models" / TI2V_NAME
    rng = generator("wide codec")
    clips = render(draw_scenes(draw_captions(48, rng), rng))  # few, so that it is soon made
    wide = PatchCodec.fit(2.0 * clips - 1.0, WAN22)
    make_folder(both_folder, TI2V_NAME, TI2V_MINIATURE, wide)
    write_weights(build_wan(TI2V_MINIATURE).state_dict(), both_folder / WEIGHTS[1], {})
    make_data(root / "data" / "tiny", codec, 64)
    make_data(root / "data" / "tiny", wide, 64, TI2V_LATENTS)
    make_pairs(root / "data" / "tiny", 16)


@pytest.fixture(scope="session")
def experts_root(shared_tmp: Path, tiny_root: Path) -> Path:
    """The same of two experts: wan_models/Wan2.2-{T2V, I2V}-A14B-Tiny, and the data of tiny_root.

    Miniatures with random weights, other ones in each expert.
    """
    return made_once(shared_tmp, "experts", lambda root: make_experts_root(root, tiny_root))


def make_experts_root(root: Path, twin: Path) -> None:
    """See the fixture experts_root; twin: tiny_root."""
    codec = PatchCodec.load(twin / "wan_models" / NAME / CODEC)
    for name, sizes in zip(EXPERT_NAMES, (MINIATURE, EXPERT_MINIATURE), strict=True):
        folder = root / "wan_models" / name
        make_folder(folder, name, sizes, codec)
        for seed, side in enumerate(SIDES):
            file = folder / weights_in(HOMES[side])[1]
            write_weights(build_wan(sizes, seed=seed).state_dict(), file, {})
    (root / "data").symlink_to(twin / "data")


@pytest.fixture(scope="session")
def configs(tmp_path_factory: pytest.TempPathFactory, tiny_root: Path) -> dict[str, Path]:
    """The config files of tests.runs.CONFIGS."""
    folder = tmp_path_factory.mktemp("configs")
    return {name: write_config(folder, tiny_root, name) for name in CONFIGS}


def make_pairs(data: Path, count: int) -> None:
    """Write <data>/ode_pairs: noise that moves straight to each of `count` clips, in four steps."""
    steps, folder = [1000, 750, 500, 250], data / "ode_pairs"
    reader = ShardReader(data / "latents")
    x0 = torch.stack([reader.latents(i) for i in range(count)])
    noise = torch.randn(x0.shape, generator=generator("pairs"))
    levels = [*step_sigmas(steps, 5.0), 0.0]
    with ShardWriter(folder / "shard_00000") as writer:
        states = torch.stack([(1.0 - s) * x0 + s * noise for s in levels], dim=1)
        writer.append([reader.prompt(i) for i in range(count)], trajectories=states)
    shape = list(x0.shape[1:])
    manifest = TrajectoryManifest(
        count, steps, 5.0, shape, 8, 2.0, 0, "captions", "", False, "weights"
    )
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest)), encoding="utf-8")
