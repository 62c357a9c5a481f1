"""What a run refuses before it reads a weight: data that its method cannot learn from."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from tests.commands import no_weights
from tests.conftest import build_wan
from tests.runs import refusal
from trainer.config import load
from trainer.run import resolve
from trainer.serving import check_source, load_generator
from utils.data.shards import ShardWriter
from utils.errors import UserError
from utils.records import MANIFEST

__all__ = ["no_weights"]

pytestmark = pytest.mark.usefixtures("no_weights")


@pytest.fixture
def pairs(tiny_root: Path) -> Path:
    """ODE pairs of shift 5, four steps and shape [16, 5, 4, 4]."""
    return tiny_root / "data" / "tiny" / "ode_pairs"


@pytest.mark.parametrize(
    ("override", "there", "here"),
    [
        ("timestep_shift=3", "timestep_shift 5.0", "3.0"),
        (
            "denoising_step_list=[1000,500]",
            "denoising_step_list [1000, 750, 500, 250]",
            "[1000, 500]",
        ),
        ("latent_shape=[16,3,4,4]", "latent_shape [16, 5, 4, 4]", "[16, 3, 4, 4]"),
    ],
)
def test_ode_pairs_of_another_making_are_refused(
    override: str, there: str, here: str, pairs: Path, configs: dict[str, Path], tmp_path: Path
) -> None:
    assert refusal(configs["ode"], tmp_path, override) == (
        f"data.path: the ODE pairs in {pairs} were made with {there}, here {here}; set the same, "
        "or make pairs of your own with scripts/generate_ode_pairs.py"
    )


def test_all_that_differs_in_the_making_of_ode_pairs_is_told_together(
    pairs: Path, configs: dict[str, Path], tmp_path: Path
) -> None:
    words = ("denoising_step_list=[1000]", "timestep_shift=1")
    assert refusal(configs["ode"], tmp_path, *words) == (
        f"data.path: the ODE pairs in {pairs} were made with denoising_step_list "
        "[1000, 750, 500, 250], here [1000]; timestep_shift 5.0, here 1.0; set the same, or make "
        "pairs of your own with scripts/generate_ode_pairs.py"
    )


@pytest.mark.parametrize("data", ["prompts.txt", "latents"])
def test_data_without_ode_pairs_is_refused(
    data: str, tiny_root: Path, configs: dict[str, Path], tmp_path: Path
) -> None:
    path = tiny_root / "data" / "tiny" / data
    assert refusal(configs["ode"], tmp_path, f"data.path={path}") == (
        f"data.path: {path} holds no ODE pairs; make them with scripts/generate_ode_pairs.py"
    )


def test_unfinished_ode_pairs_are_refused(
    pairs: Path, configs: dict[str, Path], tmp_path: Path
) -> None:
    path = shutil.copytree(pairs, tmp_path / "pairs")
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    (path / MANIFEST).write_text(json.dumps(manifest | {"count": 20}), encoding="utf-8")
    assert refusal(configs["ode"], tmp_path, f"data.path={path}") == (
        f"data.path: {path} holds 16 of 20 ODE pairs; run scripts/generate_ode_pairs.py again to "
        "finish it"
    )


def test_ode_pairs_that_are_not_what_their_manifest_says_are_refused(
    pairs: Path, configs: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "pairs"
    with ShardWriter(path / "shard_00000") as writer:
        writer.append(["a"] * 16, trajectories=torch.zeros(16, 3, 16, 5, 4, 4))
    shutil.copy((pairs / MANIFEST), path)
    assert refusal(configs["ode"], tmp_path, f"data.path={path}") == (
        f"data.path: trajectories in {path} are [3, 16, 5, 4, 4], not [5, 16, 5, 4, 4]"
    )


def test_a_damaged_manifest_is_named(pairs: Path, configs: dict[str, Path], tmp_path: Path) -> None:
    path = shutil.copytree(pairs, tmp_path / "pairs")
    (path / MANIFEST).write_text('{"count": 16}', encoding="utf-8")
    message = refusal(configs["ode"], tmp_path, f"data.path={path}")
    assert message.startswith(f"{path}/manifest.json: not a manifest of ODE pairs: ")


@pytest.mark.parametrize("kernel", ["flash2", "sage"])
def test_an_attention_kernel_that_does_not_work_here_is_refused_before_weights_are_read(
    kernel: str, configs: dict[str, Path], tmp_path: Path
) -> None:
    told = refusal(configs["dmd"], tmp_path, f"parallel.attention={kernel}")
    assert told.startswith(f"attention '{kernel}' cannot be used: it ")
    assert told.endswith("; choose auto, or another")


@pytest.mark.parametrize("kernel", ["flash2", "sage"])
def test_clips_refuse_such_a_kernel_before_weights_are_read(
    kernel: str, tiny_root: Path, configs: dict[str, Path]
) -> None:
    config = load(configs["dmd"], [f"parallel.attention={kernel}"])
    folder = tiny_root / "wan_models" / "Wan2.1-T2V-Tiny"
    source = check_source(config, folder, use_ema=None)
    with pytest.raises(UserError, match=f"attention '{kernel}' cannot be used: it needs a CUDA"):
        load_generator(source, torch.device("cpu"))


LATENTS = "needs real latents"
DISCRIMINATED = f"method 'dmd' with loss.gan_weight or loss.divergence {LATENTS}"
GIVEN = "causal.given_first_frame needs real latents or images"


@pytest.mark.parametrize(
    ("method", "overrides", "who"),
    [
        ("gan", (), f"method 'gan' {LATENTS}"),
        ("diffusion", (), f"method 'diffusion' {LATENTS}"),
        ("causvid", (), f"method 'causvid' {LATENTS}"),
        ("consistency", (), f"method 'consistency' {LATENTS}"),
        ("dmd", ("loss.gan_weight=0.1",), DISCRIMINATED),
        ("dmd", ("loss.divergence=forward_kl",), DISCRIMINATED),
        ("self_forcing_dmd", ("causal.given_first_frame=true",), GIVEN),
    ],
)
def test_prompts_alone_are_refused_where_real_latents_are_needed(
    method: str,
    overrides: tuple[str, ...],
    who: str,
    tiny_root: Path,
    configs: dict[str, Path],
    tmp_path: Path,
) -> None:
    path = tiny_root / "data" / "tiny" / "prompts.txt"
    assert refusal(configs[method], tmp_path, f"data.path={path}", *overrides) == (
        f"data.path: {who}, but {path} holds none"
    )


def test_latents_of_another_shape_are_refused(
    tiny_root: Path, configs: dict[str, Path], tmp_path: Path
) -> None:
    path = tiny_root / "data" / "tiny" / "latents"
    assert refusal(configs["gan"], tmp_path, "latent_shape=[16,4,4,4]") == (
        f"latent_shape: is [16, 4, 4, 4], but the latents in {path} are [16, 5, 4, 4]"
    )


@pytest.mark.parametrize("layers", ["[0,2]", "[-1]", "[1,1]"])
@pytest.mark.parametrize("method", ["gan", "dmd_gan"])
def test_layers_that_a_discriminator_cannot_read_are_refused(
    method: str, layers: str, configs: dict[str, Path], tmp_path: Path
) -> None:
    assert refusal(configs[method], tmp_path, f"discriminator.layers={layers}") == (
        f"discriminator.layers: must be different blocks of 0 .. 1, got {json.loads(layers)}"
    )


@pytest.mark.parametrize(("role", "seed"), [("generator", 1), ("critic", 2), ("teacher", 1)])
def test_each_role_takes_its_own_network_of_a_checkpoint(
    role: str, seed: int, configs: dict[str, Path], tmp_path: Path
) -> None:
    groups = {g: build_wan(seed=i).state_dict() for i, g in ((1, "generator"), (2, "critic"))}
    torch.save(groups, tmp_path / "both.pt")
    config = load(configs["dmd"], [f"{role}.weights={tmp_path}/both.pt"])
    name = "blocks.0.ffn.0.weight"
    expected = build_wan(seed=seed).state_dict()[name]
    assert torch.equal(resolve(config).weights(role).read(name), expected)


def test_a_critic_takes_the_generator_of_a_checkpoint_without_a_critic_and_says_so(
    configs: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({"generator": build_wan(seed=1).state_dict()}, tmp_path / "one.pt")
    config = load(configs["dmd"], [f"critic.weights={tmp_path}/one.pt"])
    name = "blocks.0.ffn.0.weight"
    expected = build_wan(seed=1).state_dict()[name]
    with caplog.at_level(logging.WARNING, logger="trainer.run"):
        assert torch.equal(resolve(config).weights("critic").read(name), expected)
    assert caplog.messages == [
        f"critic.weights: {tmp_path}/one.pt holds no critic; its generator is taken"
    ]
