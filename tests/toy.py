"""A model and data of a family that the project does not have: see tests/new_family/."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from model import families
from utils.data.shards import ShardWriter
from utils.seeding import generator
from utils.weights import fill_weights, write_weights

HOME = str(Path(__file__).resolve().parent / "new_family")
NAME = "Toy-1"
WIDTH, LAYERS, TEXT_LENGTH, TEXT_WIDTH = 16, 3, 5, 10
SHAPE = (6, 5, 4, 6)  # latents [C, F, H, W]; 9 pixel frames of 16 x 24
PROMPTS = [f"a {colour} {thing}" for colour in ("red", "green", "blue") for thing in ("bar", "dot")]


@contextlib.contextmanager
def at_home() -> Iterator[None]:
    """For the length of the body, the toy's folder is in model/families/; nothing else is done."""
    families.__path__.append(HOME)
    try:
        yield
    finally:
        families.__path__.remove(HOME)
        for name in [name for name in sys.modules if name.startswith("model.families.toy")]:
            del sys.modules[name]


def make_toy(folder: Path) -> Path:
    """Write a whole model folder; `at_home` must be open."""
    from model.families.toy.encoders import CHANNELS
    from model.families.toy.network import ToyNetwork, initial_value

    folder.mkdir(parents=True)
    sizes = {
        "width": WIDTH,
        "layers": LAYERS,
        "text_length": TEXT_LENGTH,
        "text_width": TEXT_WIDTH,
    }
    text = json.dumps({"_class_name": "ToyDenoiser", **sizes})
    (folder / "config.json").write_text(text, encoding="utf-8")
    network = ToyNetwork(CHANNELS, WIDTH, LAYERS, TEXT_WIDTH)
    fill_weights(network, lambda name, shape: initial_value(name, shape, generator("toy", name)))
    write_weights(network.state_dict(), folder / "denoiser.safetensors", {})
    table = torch.randn(64, TEXT_WIDTH, generator=generator("words"))
    write_weights({"table": table}, folder / "text.safetensors", {})
    write_weights({"scale": torch.tensor(2.0)}, folder / "codec.safetensors", {})
    return folder


def make_data(folder: Path) -> None:
    """Write <folder>/prompts.txt, and <folder>/latents with first frames of 16 x 24 pixels."""
    folder.mkdir(parents=True)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    rng = generator("toy data")
    latents = torch.randn(len(PROMPTS), *SHAPE, generator=rng)
    images = torch.randint(256, (len(PROMPTS), 3, 16, 24), generator=rng, dtype=torch.uint8)
    with ShardWriter(folder / "latents" / "shard_0") as writer:
        writer.append(PROMPTS, latents, images=images)


COMMON = """
generator: {{model: {name}, lr: 1.0e-2, betas: [0.5, 0.9]}}
mixed_precision: false
latent_shape: [6, 5, 4, 6]
steps: 4
batch_size: 2
model_root: {root}
logging: {{wandb: false}}
log_every: 1
save_every: 2
keep_checkpoints: 10
validation: {{every: 4, count: 2}}
timeout_s: 60
"""

METHODS = {
    "diffusion": """
trainer: diffusion
loss: {{caption_dropout: 0.5}}
data: {{path: {root}/data/latents}}
sampling: {{steps: 3, cfg_scale: 2.0}}
""",
    "dmd": """
trainer: score_distillation
loss: {{cfg_scale: 2.0, generator_every: 2}}
critic: {{lr: 1.0e-2, betas: [0.5, 0.9]}}
ema: {{decay: 0.5, start_step: 2}}
denoising_step_list: [1000, 500]
data: {{path: {root}/data/prompts.txt}}
""",
    "gan": """
trainer: gan
loss: {{generator_every: 2}}
discriminator: {{lr: 1.0e-2}}
denoising_step_list: [1000, 500]
data: {{path: {root}/data/latents}}
""",
}


def write_config(root: Path, method: str) -> Path:
    """Write <root>/<method>.yaml: a small run of the model at `root`."""
    path = root / f"{method}.yaml"
    path.write_text((METHODS[method] + COMMON).format(root=root, name=NAME), encoding="utf-8")
    return path
