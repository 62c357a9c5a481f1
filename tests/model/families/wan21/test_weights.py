"""Weights of transformers wherever they come from, and what is said of those that do not fit."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model.families.wan21.folder import CONFIG, WEIGHTS
from model.families.wan21.weights import check_weights, find_weights, load_network
from model.folders.loading import Placement
from model.wan.config import WanConfig, diffusers_config, write_wan_config
from model.wan.weights import to_diffusers
from tests.conftest import build_wan
from utils import checkpoint
from utils.distributed import Session
from utils.weights import Weights, WeightsError, write_weights

Named = dict[str, Tensor]

SMALL = WanConfig(
    dim=16, ffn_dim=32, num_heads=2, num_layers=2, freq_dim=16, text_len=512, text_dim=8
)
IMAGES = replace(SMALL, model_type="i2v", in_dim=36, image_dim=12, image_tokens=3)
CONFIGS = [SMALL, IMAGES, replace(IMAGES, model_type="flf2v")]
BOTH = pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
PREFIXES = pytest.mark.parametrize(
    "prefix",
    ["", "model.", "model._fsdp_wrapped_module.", "_fsdp_wrapped_module.model._orig_mod."],
)


def state(config: WanConfig = SMALL, seed: int = 0) -> dict[str, Tensor]:
    return dict(build_wan(config, seed=seed).state_dict())


def renamed(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {to_diffusers(name): value for name, value in values.items()}


def prefixed(values: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """`values` as a wrapper would name them, with a segment inside the blocks as well."""
    inside = "_checkpoint_wrapped_module." if prefix else ""
    return {prefix + k.replace("blocks.1.", f"blocks.1.{inside}"): v for k, v in values.items()}


def assert_loads(weights: Weights, config: WanConfig = SMALL, seed: int = 0) -> None:
    """Names, shapes and values are those of `state(config, seed)`."""
    check_weights(config, weights, what="a test")
    place = Placement(torch.device("cpu"))
    loaded = load_network(config, weights, place, what="a test").model.state_dict()
    expected = state(config, seed)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def error_of(path: Path, config: WanConfig = SMALL) -> str:
    with pytest.raises(WeightsError) as caught:
        check_weights(config, find_weights(path), what="a test")
    return str(caught.value)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
@BOTH
def test_a_file_under_diffusers_names_loads(tmp_path: Path, config: WanConfig, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    write_weights(renamed(state(config)), path, {})
    assert_loads(find_weights(path), config)


@PREFIXES
@BOTH
@pytest.mark.parametrize("translate", [dict, renamed], ids=["official", "diffusers"])
def test_prefixes_of_wrappers_do_not_matter(
    tmp_path: Path, prefix: str, suffix: str, translate: Callable[[Named], Named]
) -> None:
    path = tmp_path / f"w{suffix}"
    write_weights(prefixed(translate(state()), prefix), path, {})
    assert_loads(find_weights(path))


def foreign_checkpoint(path: Path) -> Path:
    """A .pt file of another trainer, with three networks: of seeds 1, 2 and 3."""
    gan = {
        "_cls_pred_branch.0.weight": torch.zeros(16),
        "model._register_tokens.register_tokens": torch.zeros(1, 16),
        "model._fsdp_wrapped_module._gan_ca_blocks.0.norm3.weight": torch.zeros(16),
    }
    content = {
        "generator": prefixed(state(seed=1), "model."),
        "generator_ema": prefixed(state(seed=2), "model._fsdp_wrapped_module."),
        "critic": prefixed(state(seed=3), "model.") | gan,
        "step": 600,
    }
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("role", "averaged", "seed"),
    [("generator", False, 1), ("generator", True, 2), ("critic", False, 3)],
)
def test_of_a_foreign_checkpoint_the_asked_network_loads(
    tmp_path: Path, role: str, averaged: bool, seed: int
) -> None:
    path = foreign_checkpoint(tmp_path / "model.pt")
    assert_loads(find_weights(path, role=role, averaged=averaged), seed=seed)
    assert_loads(find_weights(tmp_path, role=role, averaged=averaged), seed=seed)


def test_gan_heads_of_a_foreign_critic_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = foreign_checkpoint(tmp_path / "model.pt")
    with caplog.at_level(logging.INFO, logger="model.families.wan21.weights"):
        find_weights(path, role="generator")
        assert not caplog.messages
        find_weights(path, role="critic")
    assert caplog.messages == [
        f"{path}: left out the 3 weights of its GAN heads (_cls_pred_branch.0.weight, ...): "
        "they fit no other trainer"
    ]


def test_gan_heads_in_a_generator_are_unexpected(tmp_path: Path) -> None:
    values = state() | {"_cls_pred_branch.0.weight": torch.zeros(16)}
    write_weights(values, tmp_path / "w.pt", {})
    assert "1 unexpected ['_cls_pred_branch.0.weight']" in error_of(tmp_path / "w.pt")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("role", "averaged", "seed"),
    [("generator", False, 1), ("generator", True, 2), ("critic", False, 3)],
)
def test_of_a_training_checkpoint_the_asked_network_loads(
    tmp_path: Path, role: str, averaged: bool, seed: int
) -> None:
    content = {
        "roles": {"generator": state(seed=1), "critic": state(seed=3)},
        "ema": {"generator": state(seed=2)},
    }
    session = Session(0, 1, torch.device("cpu"))
    path = checkpoint.save(tmp_path / "checkpoints", 3, content, {}, session)
    for place in (path, tmp_path):
        assert_loads(find_weights(place, role=role, averaged=averaged), seed=seed)
    with pytest.raises(WeightsError, match=r"holds no 'ema.critic', only \['ema.generator'"):
        find_weights(path, role="critic", averaged=True)


def test_folders_of_both_layouts_hold_the_same_weights(tmp_path: Path) -> None:
    config = CONFIGS[2]
    official, diffusers = tmp_path / "official", tmp_path / "diffusers"
    (diffusers / "transformer").mkdir(parents=True)
    official.mkdir()
    write_wan_config(config, official / CONFIG)
    save_file(state(config), official / WEIGHTS[1])
    (diffusers / "transformer" / CONFIG).write_text(json.dumps(diffusers_config(config)))
    save_file(renamed(state(config)), diffusers / WEIGHTS[3])
    assert_loads(find_weights(official), config)
    assert_loads(find_weights(diffusers), config)
    assert_loads(find_weights(diffusers / "transformer"), config)


def test_what_diffusers_saved_loads(tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    twin = WanTransformer3DModel.from_config(diffusers_config(IMAGES))
    twin.load_state_dict(renamed(state(IMAGES)))
    twin.save_pretrained(tmp_path / "transformer", max_shard_size="20KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    assert_loads(find_weights(tmp_path), IMAGES)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        (
            "Wan2.1-T2V-14B",
            "fetch what is missing with: hf download Wan-AI/Wan2.1-T2V-14B --local-dir ",
        ),
        ("mine", "copy what is missing from the release that the folder was made of"),
    ],
)
def test_absent_shards_are_named_with_the_command_that_fetches_them(
    tmp_path: Path, name: str, command: str
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    write_wan_config(SMALL, folder / CONFIG)
    index = folder / WEIGHTS[0]
    index.write_text(json.dumps({"weight_map": {"head.modulation": "2.safetensors"}}))
    message = error_of(folder)
    absent = f"{index}: lists files that are missing: ['{folder}/2.safetensors']; "
    assert message.startswith(absent + command)


@pytest.mark.parametrize(
    ("other", "looks"),
    [
        (replace(SMALL, num_layers=3), "t2v with dim 16, ffn_dim 32, 3 layers, in_dim 16"),
        (replace(SMALL, dim=32), "t2v with dim 32, ffn_dim 32, 2 layers, in_dim 16"),
        (IMAGES, "i2v with dim 16, ffn_dim 32, 2 layers, in_dim 36"),
        (CONFIGS[2], "flf2v with dim 16, ffn_dim 32, 2 layers, in_dim 36"),
    ],
)
def test_another_architecture_is_read_off_the_shapes(
    tmp_path: Path, other: WanConfig, looks: str
) -> None:
    write_weights(renamed(state(other)), tmp_path / "w.safetensors", {})
    assert error_of(tmp_path / "w.safetensors").endswith(
        f"is it a checkpoint of another architecture? They look like {looks}; "
        "expected t2v with dim 16, ffn_dim 32, 2 layers, in_dim 16"
    )


def test_weights_of_another_network_are_told_as_such(tmp_path: Path) -> None:
    write_weights({"conv1.weight": torch.zeros(2)}, tmp_path / "w.safetensors", {})
    assert "They look like no Wan transformer; expected t2v" in error_of(tmp_path / "w.safetensors")


def test_missing_and_unexpected_weights_are_counted_and_listed(tmp_path: Path) -> None:
    values = state() | {"extra": torch.zeros(1)}
    for kind in ("weight", "bias"):
        del values[f"head.head.{kind}"]
    write_weights(values, tmp_path / "w.pt", {})
    assert error_of(tmp_path / "w.pt").startswith(
        f"{tmp_path}/w.pt does not fit a test: 2 weights missing "
        "['head.head.bias', 'head.head.weight'], 1 unexpected ['extra'], 0 of another shape []; "
    )


def test_weights_under_both_names_are_refused(tmp_path: Path) -> None:
    write_weights(state() | renamed(state()), tmp_path / "w.pt", {})
    assert error_of(tmp_path / "w.pt") == (
        f"{tmp_path}/w.pt: holds weights twice, under official and other names"
    )


def test_loading_names_the_architecture_too(tmp_path: Path) -> None:
    write_weights(state(IMAGES), tmp_path / "w.pt", {})
    with pytest.raises(WeightsError, match="They look like i2v"):
        load_network(
            SMALL,
            find_weights(tmp_path / "w.pt"),
            Placement(torch.device("cpu")),
            what="a test",
        )
