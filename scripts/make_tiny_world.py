"""Make the tiny world: Wan model folders without transformer weights, and data to train them.

Writes <model_root>/Wan2.1-T2V-Tiny (config, tokenizer, text encoder, codec), Wan2.1-I2V-Tiny (with
an image encoder), Wan2.2-TI2V-Tiny (a codec of stride 16), Wan2.2-T2V-A14B-Tiny and
Wan2.2-I2V-A14B-Tiny (two experts each), <data>/latents (LMDB shards, with first frames),
<data>/latents_16 (the same clips as TI2V's latents) and <data>/prompts.txt. Deterministic; nothing
is downloaded.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a checkout's packages, and no torch before the first line
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from utils import start

    start.begin()

import torch
from tqdm import tqdm

from model.encoders.clip import HEAD_DIM
from model.encoders.clip import to_official as clip_to_official
from model.encoders.umt5 import to_official
from model.experts import SIDES
from model.families.registry import open_model
from model.families.wan21.folder import CONFIG, HOMES, IMAGE_ENCODER, TEXT_ENCODER, TOKENIZER
from model.wan.config import PRESETS, WanConfig, write_wan_config
from utils import start
from utils.cli import USER_ERRORS, check_at_least, command_parser, fail, interruptible
from utils.data.shards import ShardWriter
from utils.seeding import derive_seed, generator
from utils.tiny_world.codec import FILE_NAME, WAN21, WAN22, CodecSizes, PatchCodec
from utils.tiny_world.world import captions, draw_captions, draw_scenes, render
from utils.weights import write_weights

NAME, IMAGE_NAME = "Wan2.1-T2V-Tiny", "Wan2.1-I2V-Tiny"
TI2V_NAME = "Wan2.2-TI2V-Tiny"
EXPERT_NAMES = ("Wan2.2-T2V-A14B-Tiny", "Wan2.2-I2V-A14B-Tiny")
LATENTS, TI2V_LATENTS = "latents", "latents_16"  # folders of the data
SEED = 2026  # of the world itself, not of a run: every clone makes the same one
SHARD_CLIPS, CODEC_CLIPS, CHUNK = 2048, 1024, 128
WIDE_CODEC_CLIPS = 512  # of a codec of larger patches, whose covariance is 16 times as large


def parser() -> argparse.ArgumentParser:
    """The command line of make_tiny_world.py."""
    result = command_parser(__doc__)
    result.add_argument("--model_root", type=Path, default=Path("wan_models"))
    result.add_argument("--data_path", type=Path, default=Path("data/tiny"))
    result.add_argument("--clips", type=int, default=8192)
    return result


def make_tokenizer(folder: Path) -> int:
    """Write a word-level tokenizer over the captions' words; returns its vocabulary's size."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors  # slow to import
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for caption in captions() for word in str(caption).split()})
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


def make_text_encoder(path: Path, vocabulary: int, text_dim: int) -> None:
    """Write a one-layer UMT5 encoder with fixed random weights, under official names."""
    from transformers import UMT5Config, UMT5EncoderModel  # slow to import

    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=text_dim,
        d_kv=16,
        d_ff=2 * text_dim,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(SEED, "text encoder"))
        encoder = UMT5EncoderModel(config)
    write_weights(to_official(encoder.state_dict()), path.with_suffix(".pt"), {})
    path.with_suffix(".pt").replace(path)


def make_image_encoder(path: Path, width: int) -> None:
    """Write a two-layer CLIP vision tower with fixed random weights, under official names.

    It reads 28 x 28 pixels in patches of 14, five states to an image.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel  # slow to import

    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=width // HEAD_DIM,
        image_size=28,
        patch_size=14,
        hidden_act="gelu",
    )
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(SEED, "image encoder"))
        encoder = CLIPVisionModel(config)
    state = clip_to_official(encoder.state_dict())
    write_weights(state, path.with_suffix(".pt"), {})
    path.with_suffix(".pt").replace(path)


def make_folder(
    folder: Path,
    name: str = NAME,
    sizes: WanConfig | None = None,
    codec: PatchCodec | None = None,
) -> PatchCodec:
    """Write the model folder; returns its codec. A finished folder is left as it is.

    sizes: of its transformer; None = the preset `name`. codec: as of another folder; None = it is
    made.
    """
    codec_path = folder / FILE_NAME
    if codec_path.is_file():  # written last
        return PatchCodec.load(codec_path)
    folder.mkdir(parents=True, exist_ok=True)
    config = sizes or PRESETS[name]
    vocabulary = make_tokenizer(folder / TOKENIZER)
    make_text_encoder(folder / TEXT_ENCODER, vocabulary, config.text_dim)
    if config.reads_clip:
        make_image_encoder(folder / IMAGE_ENCODER, config.image_dim)
    for side in SIDES if name in EXPERT_NAMES else (None,):
        home = folder / HOMES[side][0]
        home.mkdir(exist_ok=True)
        write_wan_config(config, home / CONFIG)
    codec = codec or fit_codec(WAN22 if config.model_type == "ti2v" else WAN21)
    codec.save(codec_path)
    return codec


def fit_codec(sizes: CodecSizes) -> PatchCodec:
    """The codec of these sizes for the world's clips."""
    rng = generator(SEED, "codec")
    count = CODEC_CLIPS if sizes == WAN21 else WIDE_CODEC_CLIPS
    clips = render(draw_scenes(draw_captions(count, rng), rng))
    return PatchCodec.fit(2.0 * clips - 1.0, sizes)


def make_data(folder: Path, codec: PatchCodec, count: int, name: str = LATENTS) -> None:
    """Write `count` captioned latents in shards below `name`, and all captions as a prompt file.

    A shard appears whole or not at all, so an interrupted call continues. The clips are the same
    for every codec.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{caption}\n" for caption in captions())
    (folder / "prompts.txt").write_text(text, encoding="utf-8")
    for number in tqdm(range(-(-count // SHARD_CLIPS)), desc=name):
        shard = folder / name / f"shard_{number}"
        if shard.is_dir():
            continue
        part = folder / f"{name}_shard_{number}.tmp"
        shutil.rmtree(part, ignore_errors=True)
        rng = generator(SEED, "clips", number)
        chosen = draw_captions(min(SHARD_CLIPS, count - number * SHARD_CLIPS), rng)
        with ShardWriter(part) as writer:
            for first in range(0, len(chosen), CHUNK):
                some = chosen[first : first + CHUNK]
                clips = render(draw_scenes(some, rng))
                images = (clips[:, :, 0] * 255.0).round().to(torch.uint8)
                latents = codec.encode_to_latent(2.0 * clips - 1.0)
                writer.append([str(c) for c in some], latents, images=images)
        shard.parent.mkdir(exist_ok=True)
        part.rename(shard)


@interruptible
def main(arguments: Sequence[str] | None = None) -> int:
    """Make the world; a second call finds it and returns at once."""
    args = parser().parse_args(arguments)
    try:
        check_at_least(args, clips=1)
        codec = make_folder(args.model_root / NAME)
        make_folder(args.model_root / IMAGE_NAME, IMAGE_NAME, codec=codec)
        make_data(args.data_path, codec, args.clips)
        for name in EXPERT_NAMES:
            make_folder(args.model_root / name, name, codec=codec)
        wide = make_folder(args.model_root / TI2V_NAME, TI2V_NAME)
        make_data(args.data_path, wide, args.clips, TI2V_LATENTS)
    except USER_ERRORS as error:
        return fail(error)
    for name in (NAME, IMAGE_NAME, TI2V_NAME, *EXPERT_NAMES):
        print(f"{args.model_root / name}: lacks {_lacking(args.model_root / name)}")
    return 0


def _lacking(path: Path) -> str:
    return "; ".join(open_model(path).missing()) or "nothing"


if __name__ == "__main__":
    sys.exit(start.run(main))
