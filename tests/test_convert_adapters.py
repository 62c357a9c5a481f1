"""convert_checkpoint.py on adapters: merged, extracted, turned back and written for other tools."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import convert_checkpoint
import inference
from model.families.wan21.folder import ModelFolder
from model.folders.adapter_files import AdapterFile, LowRank, read_adapter
from model.folders.adapter_writing import write_adapter
from model.wan.adapter_names import LAYOUTS, Layout
from pipeline.request import Request
from tests.adapters import adapter_checkpoint, header_of, layers_of, merged, random_factors
from tests.commands import ROOT, own_logging, refusal
from tests.conftest import MINIATURE, build_wan
from tests.documented import documented
from tests.folders import make_official, toy_config
from tests.runs import run, step_folder, unequal, write_config
from trainer.config import Config, load
from trainer.serving import check_source, load_generator
from utils.config import to_yaml
from utils.weights import WeightFile, write_weights

__all__ = ["own_logging"]

TOY = toy_config()
LAYERS = layers_of(TOY, embeddings=True)
SIGMAS = [1.0, 0.9375, 0.8333333333333334, 0.625]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """A text-to-video release in the official layout, in fp32."""
    return make_official(tmp_path_factory.mktemp("release") / "Wan2.1-T2V-1.3B")


@pytest.fixture
def few(tmp_path: Path) -> Path:
    path = tmp_path / "few.safetensors"
    write_adapter(path, factors(), layout="comfyui")
    return path


def factors(seed: int = 0, rank: int = 4) -> dict[str, LowRank]:
    return random_factors(LAYERS, TOY, seed=seed, rank=rank)


def base() -> dict[str, Tensor]:
    return dict(build_wan(TOY).state_dict())


def run_of(folder: Path, tiny_root: Path, *overrides: str) -> Path:
    """A run that trained an adapter of the tiny world's model, and its checkpoint."""
    folder.mkdir()
    config = load(write_config(folder, tiny_root, "dmd"), ["generator.adapter.rank=4", *overrides])
    layers = layers_of(MINIATURE)
    adapter_checkpoint(folder, random_factors(layers, MINIATURE), config=to_yaml(config))
    return folder


def convert(source: Path, target: Path, *more: str) -> int:
    line = ["--input_path", str(source), "--output_path", str(target), *more]
    return convert_checkpoint.main(line)


def refused(capsys: pytest.CaptureFixture[str], source: Path, target: Path, *more: str) -> str:
    line = ["--input_path", str(source), "--output_path", str(target), *more]
    return refusal(convert_checkpoint.main, line, capsys)


def weights_in(path: Path) -> dict[str, Tensor]:
    file = WeightFile(path)
    return {name: file.read(name) for name in file.shapes()}


def record(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def far(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert found.keys() == wanted.keys()
    return max(float((found[name].float() - value).abs().max()) for name, value in wanted.items())


# ---- merging


def test_adapters_are_merged_into_a_file_in_fp32(
    release: ModelFolder, few: Path, tmp_path: Path
) -> None:
    style = tmp_path / "style.safetensors"
    write_adapter(style, factors(1))
    target = tmp_path / "merged.safetensors"
    assert convert(release.path, target, "--adapter", str(few), "--adapter", f"{style}:0.7") == 0
    found = weights_in(target)
    wanted = merged(base(), AdapterFile(factors()), AdapterFile(factors(1)).scaled(0.7))
    assert far(found, wanted) < 1e-6
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert far(found, base()) > 0.01


def test_a_base_in_bf16_is_merged_into_fp32_unless_asked_otherwise(
    few: Path, tmp_path: Path
) -> None:
    stored = {name: value.bfloat16() for name, value in base().items()}
    write_weights(stored, tmp_path / "base.safetensors", {})
    for flags, dtype in (((), torch.float32), (("--dtype", "bfloat16"), torch.bfloat16)):
        target = tmp_path / f"{dtype}.safetensors"
        assert convert(tmp_path / "base.safetensors", target, "--adapter", str(few), *flags) == 0
        found = weights_in(target)
        wanted = merged({n: v.float() for n, v in stored.items()}, AdapterFile(factors()))
        assert {value.dtype for value in found.values()} == {dtype}
        assert unequal(found, {n: v.to(dtype) for n, v in wanted.items()}) == []


def test_rounding_a_merge_says_what_it_takes(
    release: ModelFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = AdapterFile(factors()).scaled(0.03)
    write_adapter(tmp_path / "few.safetensors", small.factors)
    line = ("--adapter", str(tmp_path / "few.safetensors"), "--dtype", "bfloat16")
    assert convert(release.path, tmp_path / "merged.safetensors", *line) == 0
    told = capsys.readouterr().err
    shares = re.search(r"takes ([\d.]+) % of a matrix's change \(median\), ([\d.]+) %", told)
    on_samples = re.search(r"on 4 inputs: ([\d.]+) % of what the adapters change is lost", told)
    assert shares is not None and on_samples is not None
    assert 1.0 < float(shares[1]) < float(shares[2]) < 100.0
    assert float(on_samples[1]) > 1.0


def test_adapters_are_merged_into_a_folder(release: ModelFolder, few: Path, tmp_path: Path) -> None:
    for layout in ("official", "diffusers"):
        target = tmp_path / layout
        assert convert(release.path, target, "--adapter", str(few), "--layout", layout) == 0
    from diffusers import WanTransformer3DModel

    ours = weights_in(tmp_path / "official" / "diffusion_pytorch_model.safetensors")
    assert far(ours, merged(base(), AdapterFile(factors()))) < 1e-6
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "diffusers" / "transformer")
    assert len(theirs.state_dict()) == len(ours)


def test_a_run_that_trained_an_adapter_is_merged(tiny_root: Path, tmp_path: Path) -> None:
    logdir = run_of(tmp_path / "run", tiny_root)
    model = tiny_root / "wan_models" / "Wan2.1-T2V-Tiny"
    target = tmp_path / "student"
    assert convert(model, target, "--adapter", str(logdir), "--layout", "official") == 0
    average = AdapterFile(random_factors(layers_of(MINIATURE), MINIATURE)).scaled(0.5)
    found = weights_in(target / "diffusion_pytorch_model.safetensors")
    assert far(found, merged(build_wan().state_dict(), average)) < 1e-6
    told = record(target / "fewstep.json")
    assert (told["kind"], told["base"], told["steps"]) == ("model", "Wan2.1-T2V-Tiny", 4)
    assert told["sigmas"] == SIGMAS
    assert "| guidance (cfg_scale) | 1 |" in (target / "README.md").read_text(encoding="utf-8")


# ---- extracting


def test_a_merged_student_is_turned_back_into_its_adapter(
    release: ModelFolder, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, back = tmp_path / "student.safetensors", tmp_path / "back.safetensors"
    assert convert(release.path, student, "--adapter", str(few)) == 0
    flags = ("--extract_from", str(release.path), "--rank", "4", "--adapter_layout", "kohya")
    capsys.readouterr()
    assert convert(student, tmp_path / "blocks.safetensors", *flags) == 0
    assert re.search(r"[1-9][\d.]* % of the whole change lies in", capsys.readouterr().err)
    assert convert(student, back, *flags[:4]) == 0
    told = capsys.readouterr().err
    assert "26 layers: 0.00 % of the change missed in all" in told
    assert "0.00 % of the whole change lies in weights that no such adapter holds" in told
    assert "on 4 inputs: velocities differ from the student's by 0.000 %" in told
    found = read_adapter(back)
    for name, pair in factors().items():
        wanted = pair.delta()
        assert (found.factors[name].delta() - wanted).norm() < 1e-5 * wanted.norm()


def test_an_extraction_reports_each_layer_and_samples(
    release: ModelFolder, few: Path, tiny_root: Path, tmp_path: Path
) -> None:
    student, back = tmp_path / "student.safetensors", tmp_path / "back"
    config = write_config(tmp_path, tiny_root, "dmd")
    assert convert(release.path, student, "--adapter", str(few)) == 0
    flags = ("--extract_from", str(release.path), "--rank", "2", "--config_path", str(config))
    assert convert(student, back, *flags) == 0
    told = record(back / "fewstep.json")["extraction"]
    assert len(told["layers"]) == len(LAYERS)
    assert {layer["rank"] for layer in told["layers"].values()} == {2}
    assert 0.1 < told["error"] < 1.0
    assert 0.01 < told["samples"]["missed"] < 1.0
    assert told["share_beside"] == 0.0


def test_an_error_chooses_the_ranks(release: ModelFolder, few: Path, tmp_path: Path) -> None:
    student, back = tmp_path / "student.safetensors", tmp_path / "back.safetensors"
    assert convert(release.path, student, "--adapter", str(few)) == 0
    flags = ("--extract_from", str(release.path), "--max_error", "0.5", "--samples", "0")
    assert convert(student, back, *flags) == 0
    ranks = {pair.rank for pair in read_adapter(back).factors.values()}
    assert ranks < {1, 2, 3, 4} and len(ranks) > 1


def test_two_files_are_enough_to_extract(few: Path, tmp_path: Path) -> None:
    write_weights(base(), tmp_path / "base.safetensors", {})
    student = tmp_path / "student.safetensors"
    assert convert(tmp_path / "base.safetensors", student, "--adapter", str(few)) == 0
    flags = ("--extract_from", str(tmp_path / "base.safetensors"))
    assert convert(student, tmp_path / "back.safetensors", *flags) == 0
    back = read_adapter(tmp_path / "back.safetensors")
    assert {pair.rank for pair in back.factors.values()} == {32}  # all that these widths have


def test_equal_models_have_nothing_to_extract(
    release: ModelFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "a.safetensors"
    assert convert(release.path, target, "--extract_from", str(release.path)) == 2
    assert "no matrix differs; nothing to extract" in capsys.readouterr().err
    assert not target.exists()


# ---- for other tools


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["regular", "ema"])
def test_a_run_is_written_in_each_layout(
    layout: Layout, kind: str, tiny_root: Path, tmp_path: Path
) -> None:
    logdir, target = run_of(tmp_path / "run", tiny_root), tmp_path / "few"
    flags = ("--use_ema",) if kind == "ema" else ()
    assert convert(logdir, target, "--adapter_layout", layout, *flags) == 0
    adapter = read_adapter(target)
    scale = 0.5 if kind == "ema" else 1.0
    for name, pair in random_factors(layers_of(MINIATURE), MINIATURE).items():
        assert torch.equal(adapter.factors[name].a, pair.a)
        assert torch.equal(adapter.factors[name].b, scale * pair.b)
    files = ["README.md", "fewstep.json", "pytorch_lora_weights.safetensors"]
    assert sorted(path.name for path in target.iterdir()) == files
    assert record(target / "fewstep.json")["layout"] == layout


def test_the_header_of_an_exported_file_tells_how_to_sample_it(
    tiny_root: Path, tmp_path: Path
) -> None:
    logdir, target = run_of(tmp_path / "run", tiny_root), tmp_path / "few.safetensors"
    assert convert(logdir, target, "--adapter_layout", "comfyui") == 0
    header = header_of(target)
    assert header["base"] == "Wan2.1-T2V-Tiny"
    assert re.fullmatch("[0-9a-f]{64}", header["base_sha256"])
    assert (header["rank"], header["steps"], header["shift"]) == ("4", "4", "5.0")
    assert json.loads(header["sigmas"]) == SIGMAS
    assert (header["method"], header["sampler"], header["cfg_scale"]) == ("dmd", "renoise", "1.0")
    assert header["licence"] == "apache-2.0"
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert names == ["few.README.md", "few.fewstep.json", "few.safetensors"]


def test_what_a_file_tells_of_itself_travels_to_other_layouts(
    tiny_root: Path, tmp_path: Path
) -> None:
    logdir, first, second = run_of(tmp_path / "run", tiny_root), tmp_path / "a", tmp_path / "b"
    assert convert(logdir, first, "--adapter_layout", "diffusers") == 0
    file = first / "pytorch_lora_weights.safetensors"
    assert convert(file, second, "--adapter_layout", "kohya") == 0
    before, after = record(first / "fewstep.json"), record(second / "fewstep.json")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"layout", "comfyui"}


def test_bf16_files_say_how_far_products_moved(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "half.safetensors"
    assert convert(few, target, "--adapter_layout", "comfyui", "--dtype", "bfloat16") == 0
    told = capsys.readouterr().err
    assert re.search(
        r"bfloat16: each product b a moved by 0\.[1-3]\d+ % of itself \(median\)", told
    )
    assert "does not say how it is sampled, so no model card is written" in told


def test_a_critics_adapter_is_written_without_a_card(tiny_root: Path, tmp_path: Path) -> None:
    held = random_factors(layers_of(MINIATURE), MINIATURE)
    step = adapter_checkpoint(tmp_path / "run", held, role="critic")
    target = tmp_path / "critic"
    assert convert(step, target, "--adapter_layout", "comfyui", "--weights", "critic") == 0
    assert [path.name for path in target.iterdir()] == ["pytorch_lora_weights.safetensors"]


# ---- the page about it


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_root: Path) -> tuple[Path, Path]:
    """A configuration, and the log directory of a run that trained adapters with it."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_config(folder, tiny_root, "dmd")
    wanted = ("steps=2", "generator.adapter.rank=4", "critic.adapter.rank=4", "ema.start_step=0")
    return config, run(
        config, folder / "run", *wanted, "generator.lr=0.05", "critic.weight_decay=0"
    )


def test_a_real_run_is_exported_served_and_merged_alike(
    trained: tuple[Path, Path], tiny_root: Path, tmp_path: Path
) -> None:
    config, logdir = trained
    model = tiny_root / "wan_models" / "Wan2.1-T2V-Tiny"
    assert convert(logdir, tmp_path / "few", "--adapter_layout", "comfyui") == 0
    flags = ("--adapter", str(tmp_path / "few"))
    assert convert(model, tmp_path / "merged.safetensors", *flags) == 0
    adapter = ["generator.adapter.rank=4", "critic.adapter.rank=4"]
    found = [
        latents(load(config, adapter), logdir),
        latents(load(config), model, str(tmp_path / "few")),
        latents(load(config), tmp_path / "merged.safetensors"),
    ]
    assert torch.equal(found[0], found[1])
    assert (found[0] - found[2]).abs().max() < 1e-5
    assert (found[0] - latents(load(config), model)).abs().max() > 1e-3


def latents(config: Config, weights: Path, *words: str) -> Tensor:
    """What is sampled for one request."""
    source = check_source(config, weights, use_ema=False, adapters=words)
    return load_generator(source, torch.device("cpu")).latents([Request("a red circle", seed=0)])


@pytest.mark.slow
def test_the_commands_of_the_page_run_as_written(
    trained: tuple[Path, Path], tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = run(write_config(tmp_path, tiny_root, "dmd"), tmp_path / "student", "steps=1")
    exported = tmp_path / "runs" / "exported"
    exported.mkdir(parents=True)
    write_adapter(
        exported / "style.safetensors", random_factors(layers_of(MINIATURE), MINIATURE, seed=7)
    )
    (tmp_path / "runs" / "tiny").mkdir()
    (tmp_path / "data" / "tiny").mkdir(parents=True)
    (tmp_path / "data" / "tiny" / "prompts.txt").write_text("a red circle\n", encoding="utf-8")
    for name, target in (
        ("wan_models", tiny_root / "wan_models"),
        ("configs", ROOT / "configs"),
        ("runs/tiny/adapter", trained[1]),
        ("runs/tiny/student", student),
    ):
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    scripts = {"convert_checkpoint.py": convert_checkpoint.main, "inference.py": inference.main}
    lines = [line for line in documented("docs/lora.md") if line[1] in scripts]  # no trainings
    lines.sort(key=lambda line: line[1] == "inference.py")  # it shows clips before files
    assert len(lines) == 7
    for python, script, *rest in lines:
        assert python == "python"
        more = ["latent_shape=[16,5,4,4]"] if script == "inference.py" else []
        assert scripts[script]([*rest, *more]) == 0, rest
    assert {path.name for path in (exported / "few").iterdir()} >= {"README.md", "fewstep.json"}


# ---- bad input


@pytest.mark.parametrize(
    ("name", "flags", "reason"),
    [
        ("a.safetensors", ("--rank", "4"), "--rank is of an extracted adapter: add --extract_from"),
        ("a.safetensors", ("--max_error", "0.1"), "--max_error is of an extracted adapter: add"),
        ("a.safetensors", ("--samples", "-1"), "--samples: must be at least 0, got -1"),
        (
            "a.safetensors",
            ("--extract_from", "BASE", "--adapter", "FEW"),
            "--adapter merges into a network, and --extract_from writes an adapter",
        ),
        (
            "a.safetensors",
            ("--adapter_layout", "kohya", "--adapter", "FEW"),
            "--adapter merges into a network, and --adapter_layout writes an adapter",
        ),
        ("a", ("--adapter_layout", "kohya", "--layout", "official"), "--layout is of a network"),
        ("a.safetensors", ("--adapter_layout", "kohya", "--dtype", "float16"), "float16: adapters"),
        ("a.pt", ("--extract_from", "BASE"), "written to a .safetensors file, or to a new folder"),
        (
            "a.safetensors",
            ("--extract_from", "BASE", "--rank", "4", "--max_error", "0.1"),
            "by its rank or by its error; give one",
        ),
        ("a.safetensors", ("--extract_from", "FEW"), "is a LoRA, an adapter that is added to"),
        ("a.safetensors", ("--adapter_layout", "kohya"), "is a whole network and no adapter"),
        ("a.safetensors", ("--adapter", "nowhere"), "adapter 'nowhere': there is no nowhere"),
        ("a.safetensors", ("--adapter", "low=FEW"), "it was made for the experts of another model"),
    ],
)
def test_words_that_do_not_go_together_are_refused(
    name: str,
    flags: tuple[str, ...],
    reason: str,
    release: ModelFolder,
    few: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_weights(base(), tmp_path / "base.safetensors", {})
    source = tmp_path / "base.safetensors"
    more = [word.replace("BASE", str(release.path)).replace("FEW", str(few)) for word in flags]
    before = sorted(tmp_path.iterdir())
    assert reason in refused(capsys, source, tmp_path / name, *more)
    assert sorted(tmp_path.iterdir()) == before


def test_an_adapter_in_a_networks_place_is_refused_with_the_flag_for_it(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, few, tmp_path / "a.safetensors")
    assert f"convert_checkpoint.py --input_path BASE --adapter {few}" in message


def test_a_file_that_is_there_is_replaced_only_if_asked(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "few2.safetensors"
    target.write_text("mine", encoding="utf-8")
    flags = ("--adapter_layout", "kohya")
    kohya = random_factors(layers_of(TOY), TOY)
    write_adapter(tmp_path / "blocks.safetensors", kohya)
    source = tmp_path / "blocks.safetensors"
    assert "is there already; give another name, or add --overwrite" in refused(
        capsys, source, target, *flags
    )
    assert target.read_text(encoding="utf-8") == "mine"
    assert convert(source, target, *flags, "--overwrite") == 0
    assert len(read_adapter(target).factors) == len(kohya)


@pytest.mark.parametrize("flags", [(), ("--layout", "official")])
def test_an_interrupted_merge_leaves_nothing(
    flags: tuple[str, ...],
    release: ModelFolder,
    few: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from model.folders.adapter_words import Merged

    read = Merged.read

    def stop(self: Merged, name: str, rows: slice = slice(None)) -> Tensor:
        if name == "head.head.weight":
            raise KeyboardInterrupt
        return read(self, name, rows)

    monkeypatch.setattr(Merged, "read", stop)
    target = tmp_path / ("student" if flags else "student.safetensors")
    assert convert(release.path, target, "--adapter", str(few), *flags) == 130
    assert [path.name for path in tmp_path.iterdir()] == [few.name]


def test_a_step_of_a_run_is_written_as_that_step(tiny_root: Path, tmp_path: Path) -> None:
    logdir = run_of(tmp_path / "run", tiny_root)
    step = step_folder(logdir, 3)
    assert convert(step, tmp_path / "few", "--adapter_layout", "comfyui") == 0
    assert len(read_adapter(tmp_path / "few").factors) == len(layers_of(MINIATURE))
