"""Random adapters, and diffusers' pipelines around small random transformers that load them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.folders.adapter_files import AdapterFile, LowRank
from model.wan.adapter_names import BLOCK_LAYERS, CLIP_LAYERS, EMBEDDING_LAYERS
from model.wan.config import WanConfig, diffusers_config
from model.wan.weights import to_diffusers
from tests.conftest import build_wan
from tests.folders import toy_config
from utils import checkpoint
from utils.distributed import Session
from utils.seeding import generator

# Twelve blocks, so that names of blocks 1 and 11 must be told apart.
DEEP = replace(toy_config(), num_layers=12)
DEEP_CLIP = replace(toy_config("i2v"), num_layers=12)


def layers_of(
    config: WanConfig = DEEP, *, embeddings: bool = False, clip: bool = False
) -> list[str]:
    """The layers of a transformer that an adapter may have."""
    parts = (*BLOCK_LAYERS, *(CLIP_LAYERS if clip else ()))
    layers = [f"blocks.{i}.{part}" for i in range(config.num_layers) for part in parts]
    beside = [name for name in EMBEDDING_LAYERS if clip or not name.startswith("img_emb")]
    return layers + (beside if embeddings else [])


def random_factors(
    layers: list[str],
    config: WanConfig = DEEP,
    *,
    rank: int = 4,
    seed: int = 0,
    mixed: bool = False,
) -> dict[str, LowRank]:
    """Factors of the layers, large enough to be seen; mixed: ranks differ from layer to layer."""
    state = build_wan(config).state_dict()
    factors = {}
    for i, layer in enumerate(layers):
        rows, columns = state[f"{layer}.weight"].shape
        r, draws = rank + (i % 3 if mixed else 0), generator(seed, "adapter", layer)
        a = torch.randn(r, columns, generator=draws) / columns**0.5
        factors[layer] = LowRank(a, 0.1 * torch.randn(rows, r, generator=draws))
    return factors


def merged(state: Mapping[str, Tensor], *adapters: AdapterFile) -> dict[str, Tensor]:
    """Weights and what adapters add to them, fp32."""
    result = {name: value.clone() for name, value in state.items()}
    for adapter in adapters:
        for name in adapter.shapes():
            result[name] += adapter.delta(name)
    return result


def theirs(config: WanConfig, state: Mapping[str, Tensor]) -> Any:
    """diffusers' transformer with weights under official names."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel.from_config(diffusers_config(config))
    model.load_state_dict({to_diffusers(name): value for name, value in state.items()})
    return model.eval()


def pipeline_of(transformer: Any, transformer_2: Any = None) -> Any:
    """diffusers' pipeline with nothing but transformers, which is all that adapters ask for."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    parts = {"tokenizer": None, "text_encoder": None, "vae": None, "scheduler": scheduler}
    boundary = None if transformer_2 is None else 0.875
    return WanPipeline(
        **parts, transformer=transformer, transformer_2=transformer_2, boundary_ratio=boundary
    )


@torch.no_grad()
def answer(transformer: Any, config: WanConfig, *, seed: int = 0) -> Tensor:
    """What diffusers' transformer says to one fixed input."""
    draws = generator(seed, "input")

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draws)

    inputs: dict[str, Any] = {
        "hidden_states": noise(1, config.in_dim, 2, 4, 4),
        "timestep": torch.tensor([750.0]),
        "encoder_hidden_states": noise(1, config.text_len, config.text_dim),
    }
    if config.reads_clip:
        inputs["encoder_hidden_states_image"] = noise(1, config.image_tokens, config.image_dim)
    result: Tensor = transformer(**inputs).sample
    return result


@contextmanager
def complaints() -> Iterator[list[str]]:
    """What diffusers and peft say of keys, and anything at all that they warn of."""
    found: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    ear = Ear(logging.WARNING)
    logger = logging.getLogger("diffusers")
    logger.addHandler(ear)
    try:
        yield found
    finally:
        logger.removeHandler(ear)


def adapter_checkpoint(
    folder: Path, factors: Mapping[str, LowRank], *, role: str = "generator", config: str = ""
) -> Path:
    """A training checkpoint of an adapter run; a generator's average is half its factors b."""

    def named(scale: float) -> dict[str, Tensor]:
        return {
            f"{layer}.adapters.{role}.{which}": (scale if which == "b" else 1.0) * value
            for layer, pair in factors.items()
            for which, value in pair._asdict().items()
        }

    state: dict[str, Any] = {"roles": {role: named(1.0)}}
    if role == "generator":
        state["ema"] = {role: named(0.5)}
    session = Session(rank=0, world_size=1, device=torch.device("cpu"))
    return checkpoint.save(folder / "checkpoints", 3, state, {"config.yaml": config}, session)


def header_of(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})
