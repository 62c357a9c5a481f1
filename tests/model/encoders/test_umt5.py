"""The text encoder: official files into transformers' UMT5, and Wan's way of padding."""

from __future__ import annotations

import logging
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.encoders.text import WanTextEncoder, clean_prompt
from model.encoders.umt5 import load_umt5, official_name, open_umt5, to_official, to_transformers
from model.families.registry import open_model
from model.families.wan21.folder import TEXT_ENCODER, TOKENIZER
from model.wan.config import write_wan_config
from tests.folders import toy_config, umt5_shapes, umt5_state, write_tokenizer
from utils.weights import WeightsError, check_fits

CAPTION = "a red bar moving left slowly on a dark background"  # ten words and an end token


@pytest.fixture(scope="module")
def original() -> Any:
    """transformers' own encoder with random weights, two layers of them."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=100,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    encoder = UMT5EncoderModel(config).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in encoder.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) / p.shape[-1] ** 0.5)
    return encoder


@pytest.fixture(scope="module")
def official(original: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its weights as an official file holds them."""
    path = tmp_path_factory.mktemp("umt5") / "models_t5_umt5-xxl-enc-bf16.pth"
    torch.save(to_official(original.state_dict()), path)
    return path


@pytest.fixture(scope="module")
def encoder(tiny_root: Path) -> WanTextEncoder:
    folder = tiny_root / "wan_models" / "Wan2.1-T2V-Tiny"
    return open_model(folder).load_text_encoder(torch.float32)


@torch.no_grad()
def test_an_official_file_computes_what_transformers_computes(
    original: Any, official: Path
) -> None:
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    expected = original(ids, mask).last_hidden_state
    assert torch.equal(load_umt5(official, torch.float32)(ids, mask).last_hidden_state, expected)


class PlainUMT5:
    """The official encoder written down from its description, for one prompt without padding."""

    def __init__(self, state: dict[str, Tensor], heads: int, layers: int) -> None:
        self.state = state
        self.heads = heads
        self.layers = layers

    def __call__(self, ids: Tensor) -> Tensor:
        """ids [n] to states [n, width]."""
        x = self.state["token_embedding.weight"][ids]
        for i in range(self.layers):
            x = x + self.attention(f"blocks.{i}.", self.norm(x, f"blocks.{i}.norm1"))
            x = x + self.feed_forward(f"blocks.{i}.ffn.", self.norm(x, f"blocks.{i}.norm2"))
        return self.norm(x, "norm")

    def norm(self, x: Tensor, name: str) -> Tensor:
        scale = (x.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()
        return x * scale * self.state[f"{name}.weight"]

    def attention(self, block: str, x: Tensor) -> Tensor:
        q, k, v = (
            (x @ self.state[f"{block}attn.{c}.weight"].T).unflatten(-1, (self.heads, -1))
            for c in "qkv"
        )
        table = self.state[f"{block}pos_embedding.embedding.weight"]
        out = torch.empty_like(q)
        for head in range(self.heads):
            for i in range(len(x)):
                bias = [float(table[bucket(j - i), head]) for j in range(len(x))]
                scores = k[:, head] @ q[i, head] + torch.tensor(bias)  # not divided by sqrt(width)
                out[i, head] = scores.softmax(dim=0) @ v[:, head]
        return out.flatten(1) @ self.state[f"{block}attn.o.weight"].T

    def feed_forward(self, ffn: str, x: Tensor) -> Tensor:
        gate = F.gelu(x @ self.state[f"{ffn}gate.0.weight"].T, approximate="tanh")
        return (x @ self.state[f"{ffn}fc1.weight"].T * gate) @ self.state[f"{ffn}fc2.weight"].T


def bucket(distance: int) -> int:
    """Of 32: 16 per direction, of which 8 exact and 8 logarithmic up to a distance of 128."""
    first, far = 16 * (distance > 0), abs(distance)
    if far < 8:
        return first + far
    return first + min(15, 8 + int(math.log(far / 8) / math.log(128 / 8) * 8))


@torch.no_grad()
def test_the_encoder_computes_what_the_official_one_is_described_to_compute(
    tmp_path: Path,
) -> None:
    state = {k: v.float() for k, v in umt5_state(50, 32).items()}
    torch.save(state, tmp_path / "t5.pth")
    encoder = load_umt5(tmp_path / "t5.pth", torch.float32)
    lengths = [150, 9, 1]  # the first is longer than the farthest bucket
    ids = torch.randint(50, (3, 150), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(150) < torch.tensor(lengths)[:, None]).long()
    states = encoder(ids, mask).last_hidden_state
    plain = PlainUMT5(state, heads=4, layers=2)
    errors = [(states[row, :n] - plain(ids[row, :n])).abs().max() for row, n in enumerate(lengths)]
    print(f"UMT5 against plain torch, valid tokens: max abs difference {max(errors):.1e}")
    assert states.std() > 0.3
    assert max(errors) < 2e-5


def test_names_of_the_official_release_have_their_known_counterparts() -> None:
    names = {
        "token_embedding.weight": "shared.weight",
        "norm.weight": "encoder.final_layer_norm.weight",
        "blocks.3.norm1.weight": "encoder.block.3.layer.0.layer_norm.weight",
        "blocks.3.norm2.weight": "encoder.block.3.layer.1.layer_norm.weight",
        "blocks.3.attn.q.weight": "encoder.block.3.layer.0.SelfAttention.q.weight",
        "blocks.3.attn.o.weight": "encoder.block.3.layer.0.SelfAttention.o.weight",
        "blocks.3.pos_embedding.embedding.weight": (
            "encoder.block.3.layer.0.SelfAttention.relative_attention_bias.weight"
        ),
        "blocks.3.ffn.gate.0.weight": "encoder.block.3.layer.1.DenseReluDense.wi_0.weight",
        "blocks.3.ffn.fc1.weight": "encoder.block.3.layer.1.DenseReluDense.wi_1.weight",
        "blocks.3.ffn.fc2.weight": "encoder.block.3.layer.1.DenseReluDense.wo.weight",
    }
    assert {name: to_transformers(name) for name in names} == names
    assert {official_name(name): name for name in names.values()} == names


def test_the_file_of_the_release_is_recognised_at_full_size(tmp_path: Path) -> None:
    shapes = umt5_shapes(256384, 4096, 10240, layers=24, heads=64)
    path = tmp_path / TEXT_ENCODER
    torch.save(
        {k: torch.empty(v, dtype=torch.bfloat16, device="meta") for k, v in shapes.items()}, path
    )
    encoder, weights = open_umt5(path)
    check_fits(encoder, weights, what="a UMT5 encoder")
    count = sum(p.numel() for p in encoder.encoder.parameters())
    print(f"UMT5-XXL's encoder: {len(shapes)} tensors, {count} parameters")
    assert (len(shapes), count) == (242, 5_680_910_336)


def test_translated_names_come_back(original: Any) -> None:
    state = dict(original.state_dict())
    del state["encoder.embed_tokens.weight"]
    assert [to_transformers(name) for name in to_official(state)] == list(state)


def test_the_encoder_is_frozen(official: Path) -> None:
    assert not any(p.requires_grad for p in load_umt5(official, torch.float32).parameters())


def test_all_weights_get_the_dtype_that_is_asked_for(official: Path) -> None:
    encoder = load_umt5(official, torch.bfloat16)
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"token_embedding.weight": torch.zeros(5, 4)}, tmp_path / "t5.pth")
    with pytest.raises(WeightsError) as caught:
        load_umt5(tmp_path / "t5.pth", torch.float32)
    assert str(caught.value) == (
        f"{tmp_path}/t5.pth: not a UMT5 encoder: "
        "'blocks.0.pos_embedding.embedding.weight' is missing"
    )


def test_a_file_that_lacks_a_weight_is_refused(original: Any, tmp_path: Path) -> None:
    state = to_official(original.state_dict())
    del state["blocks.1.attn.k.weight"]
    torch.save(state, tmp_path / "t5.pth")
    with pytest.raises(WeightsError) as caught:
        load_umt5(tmp_path / "t5.pth", torch.float32)
    assert str(caught.value).startswith(f"{tmp_path}/t5.pth does not fit a UMT5 encoder: ")
    assert "encoder.block.1.layer.0.SelfAttention.k.weight" in str(caught.value)


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_a_folder_that_transformers_wrote_is_loaded(
    original: Any, official: Path, tmp_path: Path, shard_size: str
) -> None:
    original.save_pretrained(tmp_path / "text_encoder", max_shard_size=shard_size)
    loaded = load_umt5(tmp_path / "text_encoder", torch.bfloat16).state_dict()
    expected = load_umt5(official, torch.bfloat16).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.items())


def test_a_folder_that_lacks_a_weight_is_refused(original: Any, tmp_path: Path) -> None:
    state = {k: v.clone() for k, v in original.state_dict().items()}
    del state["encoder.block.1.layer.0.SelfAttention.k.weight"]
    original.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(WeightsError, match=r"SelfAttention\.k\.weight"):
        load_umt5(tmp_path, torch.float32)


def test_the_two_layouts_give_the_same_states(
    original: Any, official: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "official", tmp_path / "diffusers"
    for folder, tokenizer in ((one, TOKENIZER), (two, "tokenizer")):
        folder.mkdir()
        sizes = replace(toy_config(), text_dim=32, text_len=12)
        write_wan_config(sizes, folder / "config.json")
        write_tokenizer(folder / tokenizer)
    shutil.copy(official, one / TEXT_ENCODER)
    original.save_pretrained(two / "text_encoder")
    states = [
        open_model(folder).load_text_encoder(torch.float32)(["a red bar"]) for folder in (one, two)
    ]
    assert torch.equal(*states)


def test_states_are_padded_to_the_text_length(encoder: WanTextEncoder) -> None:
    assert encoder(["a red bar", CAPTION]).shape == (2, 12, 64)


def test_rows_past_the_end_of_a_prompt_are_zero(encoder: WanTextEncoder) -> None:
    used = (encoder(["a red bar", CAPTION]) != 0.0).any(dim=2).int().tolist()
    assert used == [[1] * 4 + [0] * 8, [1] * 11 + [0]]


def test_an_empty_prompt_is_its_end_token_alone(encoder: WanTextEncoder) -> None:
    states = encoder([""])
    assert states[0, 0].abs().max() > 0.0
    assert torch.equal(states[0, 1:], torch.zeros(11, 64))


def test_a_prompt_does_not_depend_on_its_neighbours(encoder: WanTextEncoder) -> None:
    together = encoder(["a red bar", CAPTION])[0]
    torch.testing.assert_close(together, encoder(["a red bar"])[0], atol=1e-6, rtol=0.0)


def test_a_long_prompt_is_cut_with_a_warning(
    encoder: WanTextEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        states = encoder([f"{CAPTION} {CAPTION}"])
    assert states.shape == (1, 12, 64)
    assert caplog.messages == [
        f"prompt of 21 tokens cut to the 12 that this model reads: '{CAPTION} a red bar ...'"
    ]


def test_a_prompt_of_3000_words_is_cut_like_any_other(
    encoder: WanTextEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="model.encoders.text"):
        states = encoder(["red " * 3000])
    assert caplog.messages[0].startswith("prompt of 3001 tokens cut to the 12 that this model")
    assert torch.equal(states, encoder(["red " * 11]))


def test_a_prompt_that_fits_exactly_is_not_warned_about(
    encoder: WanTextEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        encoder([f"{CAPTION} a"])
    assert caplog.messages == []


def test_white_space_and_html_escapes_do_not_matter(encoder: WanTextEncoder) -> None:
    assert clean_prompt("  cats &amp;amp;\n dogs\t") == "cats & dogs"
    assert torch.equal(encoder(["a  red\nbar "]), encoder(["a red bar"]))


def test_quotes_and_commas_are_those_that_wan_was_trained_with() -> None:
    assert clean_prompt("\u201cit\u2019s\u201d\uff0c \u5b89\u9759") == '"it\'s", \u5b89\u9759'
