"""The text encoder: official files into transformers' UMT5, and Wan's way of padding."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from model.folder import ModelFolder
from model.umt5 import load_umt5, to_official, to_transformers
from model.wan_wrapper import WanTextEncoder, clean_prompt
from utils.weights import WeightsError

CAPTION = "a red bar moving left slowly on a dark background"  # ten words and an end token


@pytest.fixture(scope="module")
def original() -> Any:
    """transformers' own encoder with random weights, two layers of them."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=50,
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
    folder = ModelFolder(tiny_root / "wan_models" / "Wan2.1-T2V-Tiny")
    return WanTextEncoder(folder, 12, torch.float32)


@torch.no_grad()
def test_an_official_file_computes_what_transformers_computes(
    original: Any, official: Path
) -> None:
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    expected = original(ids, mask).last_hidden_state
    assert torch.equal(load_umt5(official, torch.float32)(ids, mask).last_hidden_state, expected)


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
    with pytest.raises(WeightsError, match="not a UMT5 encoder"):
        load_umt5(tmp_path / "t5.pth", torch.float32)


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


def test_a_prompt_that_fits_exactly_is_not_warned_about(
    encoder: WanTextEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        encoder([f"{CAPTION} a"])
    assert caplog.messages == []


def test_white_space_and_html_escapes_do_not_matter(encoder: WanTextEncoder) -> None:
    assert clean_prompt("  cats &amp;amp;\n dogs\t") == "cats & dogs"
    assert torch.equal(encoder(["a  red\nbar "]), encoder(["a red bar"]))
