"""The CLIP image encoder: against transformers, and against the official forward written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from model.encoders.clip import HEAD_DIM, preprocess, to_official, to_transformers
from model.families.registry import open_model
from model.families.wan21.folder import IMAGE_ENCODER, ModelFolder
from model.wan.config import write_wan_config
from tests.folders import CLIP_LAYERS, CLIP_PATCH, IMAGE_DIM, IMAGE_TOKENS, clip_state, toy_config
from utils.weights import WeightsError

CLIP_SIZE = 2 * CLIP_PATCH  # pixels
CONFIG = {
    "architectures": ["CLIPVisionModel"],
    "hidden_size": IMAGE_DIM,
    "intermediate_size": 4 * IMAGE_DIM,
    "num_hidden_layers": CLIP_LAYERS,
    "num_attention_heads": IMAGE_DIM // HEAD_DIM,
    "patch_size": CLIP_PATCH,
    "image_size": CLIP_SIZE,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Random weights under official names, fp32; the class and positions matter."""
    return {
        name: value.float() for name, value in clip_state(IMAGE_DIM, IMAGE_TOKENS, seed=3).items()
    }


def official(folder: Path, state: dict[str, Tensor]) -> ModelFolder:
    write_wan_config(toy_config("i2v"), folder / "config.json")
    torch.save(state, folder / IMAGE_ENCODER)
    return ModelFolder(folder)


def diffusers(folder: Path, state: dict[str, Tensor], prefix: str = "") -> ModelFolder:
    write_wan_config(toy_config("i2v"), folder / "config.json")
    (folder / "image_encoder").mkdir()
    (folder / "image_encoder" / "config.json").write_text(json.dumps(CONFIG))
    named = {prefix + name: v.contiguous() for name, v in to_transformers(state).items()}
    save_file(named, folder / "image_encoder" / "model.safetensors")
    return ModelFolder(folder)


def loaded(folder: ModelFolder, dtype: torch.dtype) -> Any:
    return open_model(folder.path).load_image_encoder(dtype)


def images(count: int = 2, height: int = 40, width: int = 52) -> Tensor:
    rng = torch.Generator().manual_seed(5)
    return 2.0 * torch.rand(count, 3, height, width, generator=rng) - 1.0


def official_forward(w: dict[str, Tensor], x: Tensor, layers: int) -> Tensor:
    """The vision tower as the official release describes it; x [B, 3, size, size] normalised."""
    w = {k.removeprefix("visual."): v for k, v in w.items()}
    width = w["cls_embedding"].shape[-1]
    patches = F.conv2d(x, w["patch_embedding.weight"], stride=CLIP_PATCH).flatten(2).mT
    x = torch.cat([w["cls_embedding"].repeat(len(x), 1, 1), patches], 1) + w["pos_embedding"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = norm(x, "pre_norm")
    for i in range(layers):
        block = f"transformer.{i}"
        h = linear(norm(x, f"{block}.norm1"), f"{block}.attn.to_qkv")
        q, k, v = h.unflatten(2, (3, width // HEAD_DIM, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.mT / HEAD_DIM**0.5, dim=-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"{block}.attn.proj")
        h = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.0")
        x = x + linear(0.5 * h * (1.0 + torch.erf(h / 2**0.5)), f"{block}.mlp.2")
    return x


def test_states_are_those_of_the_official_forward_before_its_last_layer(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    found = loaded(official(tmp_path, state), torch.float32)(images())
    expected = official_forward(state, preprocess(images(), CLIP_SIZE), CLIP_LAYERS - 1)
    difference = float((found - expected).abs().max())
    print(f"clip: {difference:.1e} from the official forward written out")
    assert found.shape == (2, IMAGE_TOKENS, IMAGE_DIM)
    assert difference < 1e-5
    last = official_forward(state, preprocess(images(), CLIP_SIZE), CLIP_LAYERS)
    assert (found - last).abs().max() > 0.1


@torch.no_grad()
def test_states_are_the_penultimate_ones_of_transformers(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    from transformers import CLIPVisionModel

    folder = diffusers(tmp_path, state)
    found = loaded(folder, torch.float32)(images())
    twin = CLIPVisionModel.from_pretrained(tmp_path / "image_encoder")
    hidden = twin(preprocess(images(), CLIP_SIZE), output_hidden_states=True).hidden_states
    difference = float((found - hidden[-2]).abs().max())
    print(f"clip: {difference:.1e} from transformers")
    assert difference < 1e-5


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_both_layouts_give_the_same_states_bit_for_bit(
    tmp_path: Path, state: dict[str, Tensor], prefix: str
) -> None:
    ours = loaded(official(tmp_path, state), torch.float32)(images())
    (tmp_path / IMAGE_ENCODER).unlink()
    theirs = loaded(diffusers(tmp_path, state, prefix), torch.float32)(images())
    assert torch.equal(ours, theirs)


def test_images_are_squeezed_and_normalised_as_clip_expects() -> None:
    found = preprocess(images(1, 30, 70), 8)
    small = F.interpolate(images(1, 30, 70), (8, 8), mode="bicubic", antialias=False)
    red = (small[:, 0] / 2 + 0.5 - 0.48145466) / 0.26862954
    blue = (small[:, 2] / 2 + 0.5 - 0.40821073) / 0.27577711
    assert found.shape == (1, 3, 8, 8)
    torch.testing.assert_close(found[:, 0], red)
    torch.testing.assert_close(found[:, 2], blue)


def test_an_image_does_not_depend_on_its_batch(tmp_path: Path, state: dict[str, Tensor]) -> None:
    encoder = loaded(official(tmp_path, state), torch.float32)
    together, alone = encoder(images(3))[1:2], encoder(images(3)[1:2])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0.0)


def test_the_encoder_is_frozen_and_of_the_asked_dtype(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    encoder = loaded(official(tmp_path, state), torch.bfloat16)
    assert encoder(images()).dtype == torch.bfloat16
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in encoder.parameters())


def test_the_last_layer_is_neither_kept_nor_computed(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    encoder = loaded(official(tmp_path, state), torch.float32)
    assert len(encoder.encoder.encoder.layers) == CLIP_LAYERS - 1


def test_names_go_there_and_back_bit_for_bit(state: dict[str, Tensor]) -> None:
    back = to_official(to_transformers(state))
    dropped = {"visual.head", "log_scale", "textual.token_embedding.weight"}
    assert back.keys() == state.keys() - dropped
    assert all(torch.equal(value, state[name]) for name, value in back.items())
    prefixed = {f"vision_model.{k}": v for k, v in to_transformers(state).items()}
    prefixed["vision_model.embeddings.position_ids"] = torch.arange(IMAGE_TOKENS)[None]
    assert to_official(prefixed).keys() == back.keys()


def test_names_are_those_of_transformers(state: dict[str, Tensor]) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    with torch.device("meta"):
        model = CLIPVisionModel(CLIPVisionConfig.from_dict(CONFIG))
    expected = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in to_transformers(state).items()} == expected


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key != name}


def test_a_file_without_a_tower_is_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    folder = official(tmp_path, without(state, "visual.pos_embedding"))
    with pytest.raises(WeightsError, match="not a CLIP image encoder: 'pos_embedding' is missing"):
        loaded(folder, torch.float32)


def test_a_missing_weight_is_named(tmp_path: Path, state: dict[str, Tensor]) -> None:
    folder = official(tmp_path, without(state, "visual.transformer.1.mlp.2.bias"))
    with pytest.raises(WeightsError, match=r"Missing key.*encoder.layers.1.mlp.fc2.bias"):
        loaded(folder, torch.float32)


def test_a_width_that_heads_of_80_do_not_divide_is_refused(tmp_path: Path) -> None:
    folder = official(tmp_path, clip_state(96, IMAGE_TOKENS))
    with pytest.raises(WeightsError, match=r"width 96; the official file's heads are 80 wide"):
        loaded(folder, torch.float32)


def test_an_encoder_of_another_class_is_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    folder = diffusers(tmp_path, state)
    path = tmp_path / "image_encoder" / "config.json"
    path.write_text(json.dumps(CONFIG | {"architectures": ["SiglipVisionModel"]}))
    with pytest.raises(WeightsError, match="must describe CLIPVisionModel"):
        loaded(folder, torch.float32)
