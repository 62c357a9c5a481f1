"""Small model folders in the layouts of official releases and of diffusers, with random weights."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.encoders.vae import meta_vae
from model.encoders.vae_names import to_official
from model.encoders.vae_sizes import WAN21, WAN22, Sizes
from model.experts import SIDES
from model.families.base import Export
from model.families.registry import open_model
from model.families.wan21.folder import (
    CONFIG,
    HOMES,
    IMAGE_ENCODER,
    TEXT_ENCODER,
    TOKENIZER,
    VAE22,
    ModelFolder,
)
from model.wan.config import WanConfig, write_wan_config
from tests.conftest import build_wan, random_value
from utils.tiny_world.world import captions

VAE = "Wan2.1_VAE.pth"
STEM = "diffusion_pytorch_model"
TEXT_DIM, IMAGE_DIM = 64, 160
IMAGE_TOKENS, CLIP_PATCH, CLIP_LAYERS = 5, 14, 3  # 2 x 2 patches of 28 pixels, and a class token
WORDS = (
    "a an the and of in on at to with is are it its by from over under near into man woman child "
    "dog cat bird horse car train boat city street house tree forest river sea beach sky sun moon "
    "cloud rain snow wind fire light night day morning evening red blue green white black walks "
    "runs jumps flies swims plays looks sits stands turns slowly quickly camera close up wide shot"
)


def toy_config(model_type: str = "t2v") -> WanConfig:
    """Sizes of a toy; diffusers' image models count on 512 rows of text."""
    sizes: dict[str, Any] = {
        "dim": 32,
        "ffn_dim": 64,
        "num_heads": 2,
        "num_layers": 2,
        "model_type": model_type,
        "freq_dim": 32,
        "text_dim": TEXT_DIM,
    }
    if model_type == "t2v":
        return WanConfig(**sizes, text_len=32)
    if model_type == "ti2v":
        return WanConfig(**sizes, text_len=32, in_dim=48, out_dim=48)
    return WanConfig(**sizes, in_dim=36, image_dim=IMAGE_DIM, image_tokens=IMAGE_TOKENS)


def make_official(
    folder: Path,
    model_type: str = "t2v",
    *,
    config: WanConfig | None = None,
    shards: int = 2,
    seed: int = 0,
) -> ModelFolder:
    """Write an official-layout release of `model_type` (t2v, ti2v, i2v, flf2v).

    The same for a seed.

    The transformer is fp32 in `shards` files with an index, the VAE fp32, the text encoder bf16,
    the image encoder fp16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = config or toy_config(model_type)
    write_wan_config(config, folder / CONFIG)
    write_sharded(dict(build_wan(config, seed=seed).state_dict()), folder, shards)
    _write_encoders(folder, config, seed)
    return ModelFolder(folder, codecs=VAE22 if config.model_type == "ti2v" else (VAE, "vae"))


def make_experts(folder: Path, model_type: str = "t2v", *, shards: int = 2) -> ModelFolder:
    """Write an official-layout release of two experts of `model_type` (t2v, i2v), of other seeds.

    As it is published: no config.json says that an i2v model reads no CLIP.
    """
    config = expert_config(model_type)
    for seed, side in enumerate(SIDES):
        home = folder / HOMES[side][0]
        home.mkdir(parents=True)
        write_wan_config(replace(config, clip=True), home / CONFIG)
        write_sharded(dict(build_wan(config, seed=seed).state_dict()), home, shards)
    _write_encoders(folder, config, 0)
    return ModelFolder(folder, side="high")


def expert_config(model_type: str) -> WanConfig:
    """Sizes of a toy expert, t2v or i2v without CLIP."""
    config = toy_config("t2v")
    if model_type == "t2v":
        return config
    return replace(config, model_type=model_type, in_dim=36, clip=False)


def _write_encoders(folder: Path, config: WanConfig, seed: int) -> None:
    vocabulary = write_tokenizer(folder / TOKENIZER)
    if config.model_type == "ti2v":
        torch.save(vae_state(seed, z_dim=48, published=WAN22), folder / VAE22[0])
    else:
        torch.save(vae_state(seed), folder / VAE)
    torch.save(umt5_state(vocabulary, config.text_dim, seed), folder / TEXT_ENCODER)
    if config.reads_clip:
        torch.save(clip_state(config.image_dim, config.image_tokens, seed), folder / IMAGE_ENCODER)
        (folder / "xlm-roberta-large").mkdir(exist_ok=True)
        (folder / "xlm-roberta-large" / "tokenizer_config.json").write_text("{}", encoding="utf-8")


def make_diffusers(folder: Path, twin_of: ModelFolder) -> ModelFolder:
    """Write the same weights in diffusers' layout."""
    model = open_model(twin_of.path)
    model.export(Export(model.find_weights(), "diffusers"), folder)
    return replace(twin_of, path=folder)


def write_sharded(state: dict[str, Tensor], folder: Path, shards: int) -> None:
    """Write a transformer's weights as `shards` files of equally many tensors, and their index."""
    names, total = list(state), sum(value.nbytes for value in state.values())
    each, weight_map = -(-len(names) // shards), {}
    for number in range(shards):
        file = f"{STEM}-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number * each : (number + 1) * each]
        save_file({name: state[name].contiguous() for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def write_tokenizer(folder: Path) -> int:
    """Write a word-level tokenizer; returns its vocabulary's size."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for caption in captions() for word in str(caption).split()})
    words += [word for word in WORDS.split() if word not in words]
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(str(folder))
    return len(vocabulary)


def vae_state(
    seed: int = 0, *, base_dim: int = 8, z_dim: int = 16, published: Sizes = WAN21
) -> dict[str, Tensor]:
    """Random weights of an autoencoder under official names, fp32.

    published: WAN21 or WAN22, whose widths are replaced; the decoder of WAN22 is wider.
    """
    sizes = published | {"base_dim": base_dim, "z_dim": z_dim}
    if published is WAN22:
        sizes["decoder_base_dim"] = base_dim * 3 // 2
    shapes = meta_vae(sizes).state_dict()
    names = to_official(shapes)
    return {names[name]: _vae_value(name, v.shape, seed) for name, v in shapes.items()}


def _vae_value(name: str, shape: torch.Size, seed: int) -> Tensor:
    value = random_value(name, shape, seed)
    return 1.0 + 0.1 * value if name.endswith("gamma") else value


def umt5_shapes(
    vocabulary: int, width: int, hidden: int, *, layers: int, heads: int
) -> dict[str, tuple[int, ...]]:
    """The weights of a text encoder under official names."""
    shapes: dict[str, tuple[int, ...]] = {"token_embedding.weight": (vocabulary, width)}
    for i in range(layers):
        shapes |= {f"blocks.{i}.norm{k}.weight": (width,) for k in (1, 2)}
        shapes |= {f"blocks.{i}.attn.{k}.weight": (width, width) for k in "qkvo"}
        shapes |= {f"blocks.{i}.ffn.{k}.weight": (hidden, width) for k in ("gate.0", "fc1")}
        shapes[f"blocks.{i}.ffn.fc2.weight"] = (width, hidden)
        shapes[f"blocks.{i}.pos_embedding.embedding.weight"] = (32, heads)
    return {**shapes, "norm.weight": (width,)}


def umt5_state(vocabulary: int, width: int, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of a text encoder of two layers under official names, bf16."""
    shapes = umt5_shapes(vocabulary, width, 2 * width, layers=2, heads=4)
    return {k: random_value(k, torch.Size(v), seed).bfloat16() for k, v in shapes.items()}


def clip_state(width: int, tokens: int = IMAGE_TOKENS, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of an image encoder as the official file holds them, fp16; text half cut."""
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (width, 3, CLIP_PATCH, CLIP_PATCH),
        "cls_embedding": (1, 1, width),
        "pos_embedding": (1, tokens, width),
        "head": (width, 8),
    }
    for i in range(CLIP_LAYERS):
        layer = f"transformer.{i}."
        for norm in ("norm1", "norm2"):
            shapes |= {f"{layer}{norm}.weight": (width,), f"{layer}{norm}.bias": (width,)}
        for linear, rows, columns in (
            ("attn.to_qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.0", 4 * width, width),
            ("mlp.2", width, 4 * width),
        ):
            shapes |= {f"{layer}{linear}.weight": (rows, columns), f"{layer}{linear}.bias": (rows,)}
    for norm in ("pre_norm", "post_norm"):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    state = {f"visual.{k}": random_value(k, torch.Size(v), seed) for k, v in shapes.items()}
    state["textual.token_embedding.weight"] = torch.zeros(4, width)
    state["log_scale"] = torch.tensor(math.log(1 / 0.07))
    return {name: value.half() for name, value in state.items()}
