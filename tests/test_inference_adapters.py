"""--adapter: LoRAs on top of a model, unmerged, equal the merged model, and clips tell of them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import demo
import inference
from model.folders.adapter_files import AdapterFile, LowRank
from model.folders.adapter_writing import write_adapter
from pipeline.request import Request
from tests.adapters import adapter_checkpoint, layers_of, merged, random_factors
from tests.commands import no_weights, own_logging, refusal
from tests.conftest import MINIATURE, build_wan
from tests.runs import write_config
from trainer.config import load
from trainer.serving import check_source, load_generator
from utils.seeding import generator
from utils.weights import write_weights

__all__ = ["no_weights", "own_logging"]

PROMPT = "a red circle moves right quickly on a dark floor"
LAYERS = layers_of(MINIATURE, embeddings=True)


@pytest.fixture
def config(tiny_root: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path, tiny_root, "dmd")


@pytest.fixture
def folder(tiny_root: Path) -> Path:
    """The model that adapters are added to."""
    return tiny_root / "wan_models" / "Wan2.1-T2V-Tiny"


def adapter(tmp_path: Path, name: str = "few", *, seed: int = 0) -> Path:
    path = tmp_path / f"{name}.safetensors"
    write_adapter(path, random_factors(LAYERS, MINIATURE, seed=seed), layout="comfyui")
    return path


def latents(config: Path, weights: Path, *words: str, use_ema: bool | None = False) -> Tensor:
    """What is sampled for one request."""
    source = check_source(load(config), weights, use_ema=use_ema, adapters=words)
    return load_generator(source, torch.device("cpu")).latents([Request(PROMPT, seed=0)])


def merged_file(tmp_path: Path, *adapters: AdapterFile) -> Path:
    path = tmp_path / "merged.safetensors"
    write_weights(merged(build_wan().state_dict(), *adapters), path, {})
    return path


def words(config: Path, weights: Path, output: Path, *more: str) -> list[str]:
    prompts = config.parent / "prompts.txt"
    prompts.write_text(f"{PROMPT}\n", encoding="utf-8")
    return [
        "--config_path", str(config), "--checkpoint_path", str(weights),
        "--data_path", str(prompts), "--output_folder", str(output), *more,
    ]  # fmt: skip


# ---- what is sampled


def test_adapters_on_top_equal_the_merged_model(config: Path, folder: Path, tmp_path: Path) -> None:
    one, two = adapter(tmp_path), adapter(tmp_path, "style", seed=1)
    factors = [AdapterFile(random_factors(LAYERS, MINIATURE, seed=i)) for i in range(2)]
    expected = latents(config, merged_file(tmp_path, factors[0], factors[1].scaled(0.7)))
    made = latents(config, folder, str(one), f"{two}:0.7")
    assert (made - expected).abs().max() < 1e-5
    assert (made - latents(config, folder)).abs().max() > 1e-2


def test_an_adapter_of_zeros_changes_no_bit(config: Path, folder: Path, tmp_path: Path) -> None:
    factors = {n: LowRank(a, 0 * b) for n, (a, b) in random_factors(LAYERS, MINIATURE).items()}
    write_adapter(tmp_path / "zero.safetensors", factors)
    made = latents(config, folder, str(tmp_path / "zero.safetensors"))
    assert torch.equal(made, latents(config, folder))
    assert torch.equal(latents(config, folder, f"{adapter(tmp_path)}:0"), made)


def test_whole_differences_of_other_tools_are_added(
    config: Path, folder: Path, tmp_path: Path
) -> None:
    draws = generator(0, "diff")
    diffs = {
        "blocks.0.norm3.bias": 0.3 * torch.randn(32, generator=draws),
        "blocks.1.modulation": 0.3 * torch.randn(1, 6, 32, generator=draws),
    }
    factors = random_factors(["blocks.0.ffn.0"], MINIATURE)
    tensors = {
        "diffusion_model.blocks.0.norm3.diff_b": diffs["blocks.0.norm3.bias"],
        "diffusion_model.blocks.1.diff_m": diffs["blocks.1.modulation"],
        "diffusion_model.blocks.0.ffn.0.lora_down.weight": factors["blocks.0.ffn.0"].a,
        "diffusion_model.blocks.0.ffn.0.lora_up.weight": factors["blocks.0.ffn.0"].b,
    }
    write_weights(tensors, tmp_path / "few.safetensors", {})
    expected = latents(config, merged_file(tmp_path, AdapterFile(factors, diffs).scaled(0.5)))
    made = latents(config, folder, f"{tmp_path / 'few.safetensors'}:0.5")
    assert (made - expected).abs().max() < 1e-5


@pytest.mark.parametrize("use_ema", [False, True, None])
def test_a_run_that_trained_an_adapter_is_served_on_its_base(
    use_ema: bool | None, config: Path, tmp_path: Path
) -> None:
    factors = random_factors(LAYERS, MINIATURE)
    adapter_checkpoint(tmp_path / "run", factors)
    scale = 1.0 if use_ema is False else 0.5  # its average has half the factors
    expected = latents(config, merged_file(tmp_path, AdapterFile(factors).scaled(scale)))
    made = latents(config, tmp_path / "run", use_ema=use_ema)
    assert (made - expected).abs().max() < 1e-5


def test_adapters_below_a_trained_one_stay_on(config: Path, tmp_path: Path) -> None:
    below, own, style = (
        AdapterFile(random_factors(LAYERS, MINIATURE, seed=seed)) for seed in range(3)
    )
    write_adapter(tmp_path / "below.safetensors", below.factors)
    write_adapter(tmp_path / "style.safetensors", style.factors)
    adapter_checkpoint(tmp_path / "run", dict(own.factors))
    words = [f"{tmp_path}/below.safetensors:0.5"]
    text = config.read_text(encoding="utf-8")
    text = re.sub(r"generator: {(.*)}", r"generator: {\1, ADAPTERS}", text)
    trained = config.with_name("trained.yaml")
    trained.write_text(text.replace("ADAPTERS", f"adapter: {{rank: 4}}, adapters: {words}"))
    expected = latents(config, merged_file(tmp_path, below.scaled(0.5), own, style))
    made = latents(trained, tmp_path / "run", f"{tmp_path}/style.safetensors", use_ema=False)
    assert (made - expected).abs().max() < 1e-5


# ---- what clips tell of them


def manifest(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "manifest.json").read_text(encoding="utf-8")))


def test_the_manifest_names_adapters_strengths_and_contents(
    config: Path, folder: Path, tmp_path: Path
) -> None:
    few, clips = adapter(tmp_path), tmp_path / "clips"
    line = words(config, folder, clips, "--adapter", f"{few}:0.5")
    assert inference.main(line) == 0
    told = manifest(clips)
    assert told["adapters"] == [{"path": str(few), "strength": 0.5, "expert": None}]
    digests = told["weights_sha256"]
    assert isinstance(digests, dict)
    assert list(digests) == ["diffusion_pytorch_model.safetensors", "adapters/0/few.safetensors"]
    assert inference.main(line) == 0  # goes on


def test_clips_without_adapters_say_nothing_of_them(
    config: Path, folder: Path, tmp_path: Path
) -> None:
    assert inference.main(words(config, folder, tmp_path / "clips")) == 0
    assert "adapters" not in manifest(tmp_path / "clips")


def test_clips_of_other_adapters_do_not_share_a_folder(
    config: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few, style, clips = adapter(tmp_path), adapter(tmp_path, "style", seed=1), tmp_path / "clips"
    assert inference.main(words(config, folder, clips, "--adapter", str(few))) == 0
    for more in ((), ("--adapter", f"{few}:0.5"), ("--adapter", str(style))):
        line = words(config, folder, clips, *more)
        assert "adapters" in refusal(inference.main, line, capsys)
    shutil.copy(style, few)
    line = words(config, folder, clips, "--adapter", str(few))
    message = refusal(inference.main, line, capsys)
    assert f"holds clips of other weights: {folder}" in message and "few.safetensors" in message


def test_an_adapter_folder_is_told_by_the_content_of_its_files(
    config: Path, folder: Path, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "few", random_factors(LAYERS, MINIATURE), texts={"README.md": "x"})
    clips = tmp_path / "clips"
    assert inference.main(words(config, folder, clips, "--adapter", f"{tmp_path / 'few'}")) == 0
    digests = manifest(clips)["weights_sha256"]
    assert isinstance(digests, dict)
    assert "adapters/0/pytorch_lora_weights.safetensors" in digests and len(digests) == 2


# ---- what is refused


@pytest.mark.usefixtures("no_weights")
def test_adapters_that_do_not_fit_are_told_before_weights_are_read(
    config: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.safetensors"
    write_adapter(other, {"blocks.7.ffn.0": LowRank(torch.zeros(2, 32), torch.zeros(64, 2))})
    for word, reason in (
        ("absent:0.5", "adapter 'absent:0.5': there is no absent; the form is PATH[:STRENGTH]"),
        (str(other), "blocks.7.ffn.0.weight; it was made for a model with more blocks"),
        (f"high={other}", "high.blocks.7.ffn.0.weight; it was made for the experts of another mo"),
        (str(folder / "diffusion_pytorch_model.safetensors"), "is a whole network and no adapter"),
    ):
        line = words(config, folder, tmp_path / "clips", "--adapter", word)
        assert reason in refusal(inference.main, line, capsys)
        line = ["--config_path", str(config), "--checkpoint_path", str(folder), "--adapter", word]
        assert reason in refusal(demo.main, line, capsys)
    assert not (tmp_path / "clips").exists()
