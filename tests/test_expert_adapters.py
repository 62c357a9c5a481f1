"""Adapters of two experts (Wan2.2 A14B): served, merged, extracted and written side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import convert_checkpoint
from model.experts import SIDES
from model.families.registry import open_model
from model.folders.adapter_files import AdapterFile, LowRank, read_adapter
from model.folders.adapter_writing import write_adapter
from pipeline.request import Request
from tests.adapters import adapter_checkpoint, layers_of, random_factors
from tests.commands import own_logging
from tests.folders import expert_config, make_experts
from trainer.config import load
from trainer.serving import check_source, load_generator
from utils.config import to_yaml

__all__ = ["own_logging"]

CONFIG = """
trainer: score_distillation
generator: {{model: Wan2.2-T2V-A14B, lr: 1.0e-5}}
data: {{path: nowhere.txt}}
model_root: {root}
mixed_precision: false
timestep_shift: {shift}
latent_shape: [16, 2, 4, 4]
steps: 1
batch_size: 1
logging: {{wandb: false}}
"""
TOY = expert_config("t2v")
GATE = (0.95454545 + 0.875) / 2  # with shift 7 the third of four steps is the release's boundary


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_experts(tmp_path_factory.mktemp("experts") / "Wan2.2-T2V-A14B").path


@pytest.fixture(scope="module")
def config(release: Path) -> Path:
    """A student in four steps of shift 7."""
    path = release.parent / "student.yaml"
    path.write_text(CONFIG.format(root=release.parent, shift=7.0), encoding="utf-8")
    return path


def factors(side: str) -> dict[str, LowRank]:
    return random_factors(layers_of(TOY), TOY, seed=SIDES.index(side))  # type: ignore[arg-type]


def both() -> dict[str, LowRank]:
    """Each expert's own, named by its side."""
    return {f"{side}.{n}": pair for side in SIDES for n, pair in factors(side).items()}


def files(folder: Path) -> dict[str, Path]:
    """An adapter file for each expert."""
    found = {side: folder / f"{side}.safetensors" for side in SIDES}
    for side, path in found.items():
        write_adapter(path, factors(side), layout="comfyui")
    return {str(side): path for side, path in found.items()}


def convert(source: Path, target: Path, *more: str) -> int:
    line = ["--input_path", str(source), "--output_path", str(target), *more]
    return convert_checkpoint.main(line)


def latents(config: Path, weights: Path, *words: str) -> Tensor:
    source = check_source(load(config), weights, use_ema=None, adapters=words)
    return load_generator(source, torch.device("cpu")).latents([Request("a dog", seed=0)])


def state(folder: Path) -> Mapping[str, Tensor]:
    weights = open_model(folder).find_weights()
    return {name: weights.read(name) for name in weights.shapes()}


def test_each_expert_is_served_with_its_own_adapter(
    release: Path, config: Path, tmp_path: Path
) -> None:
    words = [f"{side}={path}" for side, path in files(tmp_path).items()]
    assert convert(
        release, tmp_path / "merged", "--layout", "official",
        *(word for pair in words for word in ("--adapter", pair)),
    ) == 0  # fmt: skip
    write_adapter(tmp_path / "both", both())
    made = latents(config, release, *words)
    assert torch.equal(made, latents(config, release, str(tmp_path / "both")))
    assert (made - latents(config, tmp_path / "merged")).abs().max() < 1e-5
    for word in words:  # both count, since each is asked in two of the four steps
        assert (made - latents(config, release, word)).abs().max() > 1e-3


def test_a_students_gate_lies_between_its_steps(release: Path, config: Path) -> None:
    source = check_source(load(config), release, use_ema=None)
    network = load_generator(source, torch.device("cpu")).network
    assert network.boundary == pytest.approx(GATE, rel=1e-6)


def test_a_file_that_does_not_say_for_which_expert_is_refused(
    release: Path, config: Path, tmp_path: Path
) -> None:
    path = files(tmp_path)["low"]
    with pytest.raises(ValueError, match="say which it is for with high=path or low=path"):
        check_source(load(config), release, use_ema=None, adapters=[str(path)])


def test_a_merged_pair_for_diffusers_keeps_the_students_gate_and_shift(
    release: Path, config: Path, tmp_path: Path
) -> None:
    from diffusers import WanPipeline

    write_adapter(tmp_path / "both", both())
    flags = ("--adapter", str(tmp_path / "both"), "--config_path", str(config))
    assert convert(release, tmp_path / "student", "--layout", "diffusers", *flags) == 0
    index = json.loads((tmp_path / "student" / "model_index.json").read_text(encoding="utf-8"))
    assert index["boundary_ratio"] == pytest.approx(GATE, rel=1e-6)
    pipe: Any = WanPipeline.from_pretrained(tmp_path / "student")
    assert pipe.scheduler.config.flow_shift == 7.0
    counts = {"transformer": 0, "transformer_2": 0}
    for name in counts:

        def count(*_: object, name: str = name) -> None:
            counts[name] += 1

        getattr(pipe, name).register_forward_hook(count)
    pipe(
        prompt="a dog", height=32, width=32, num_frames=5, num_inference_steps=4,
        guidance_scale=1.0, output_type="latent",
    )  # fmt: skip
    assert counts == {"transformer": 2, "transformer_2": 2}
    record = json.loads((tmp_path / "student" / "fewstep.json").read_text(encoding="utf-8"))
    assert record["boundary"] == index["boundary_ratio"] and len(record["base_sha256"]) == 64
    adapter, plain = AdapterFile(both()), state(release)
    for name, value in state(tmp_path / "student").items():
        wanted = plain[name] + adapter.delta(name) if name in adapter.shapes() else plain[name]
        assert torch.allclose(value, wanted, rtol=0, atol=1e-6), name


def test_a_student_of_both_experts_is_extracted_into_a_file_each(
    release: Path, config: Path, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "both", both())
    flags = ("--adapter", str(tmp_path / "both"), "--layout", "official")
    assert convert(release, tmp_path / "student", *flags) == 0
    flags = ("--extract_from", str(release), "--rank", "4", "--config_path", str(config))
    assert convert(tmp_path / "student", tmp_path / "back", *flags) == 0
    names = {path.name for path in (tmp_path / "back").iterdir()}
    assert names == {
        "README.md", "fewstep.json", "high_noise_model.safetensors", "low_noise_model.safetensors",
    }  # fmt: skip
    found = read_adapter(tmp_path / "back").factors
    for name, pair in both().items():
        assert (found[name].delta() - pair.delta()).norm() < 1e-4 * pair.delta().norm()
    page = (tmp_path / "back" / "README.md").read_text(encoding="utf-8")
    assert "| boundary between the experts | 0.9148 |" in page
    assert "weight_name='low_noise_model.safetensors'" in page
    assert "load_into_transformer_2=True" in page


@pytest.mark.parametrize("side", SIDES)
def test_a_run_of_one_expert_is_written_under_that_experts_name(
    side: str, release: Path, config: Path, tmp_path: Path
) -> None:
    settings = load(config, [f"generator.experts={side}", "generator.adapter.rank=4"])
    adapter_checkpoint(tmp_path / "run", factors(side), config=to_yaml(settings))
    assert convert(tmp_path / "run", tmp_path / "few", "--adapter_layout", "diffusers") == 0
    names = {path.name for path in (tmp_path / "few").iterdir()}
    assert names == {"README.md", "fewstep.json", f"{side}_noise_model.safetensors"}
    assert set(read_adapter(tmp_path / "few").factors) == {f"{side}.{n}" for n in factors(side)}
    record = json.loads((tmp_path / "few" / "fewstep.json").read_text(encoding="utf-8"))
    assert record["expert"] == side and record["boundary"] == pytest.approx(GATE, rel=1e-6)


def test_two_adapters_of_experts_in_one_file_are_refused(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(tmp_path / "both", both())
    line = ["--input_path", str(tmp_path / "both"), "--adapter_layout", "kohya"]
    line += ["--output_path", str(tmp_path / "few.safetensors")]
    assert convert_checkpoint.main(line) == 2
    assert "an adapter of two experts is a folder with a file for each" in capsys.readouterr().err
