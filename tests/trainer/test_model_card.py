"""What lies beside an export: its calls run as written, at the noise levels of the student."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from model.flow import step_sigmas
from model.folders.adapter_files import AdapterFile
from model.folders.adapter_writing import write_adapter
from tests.adapters import layers_of, merged, random_factors, theirs
from tests.conftest import build_wan
from tests.folders import make_diffusers, make_official, toy_config
from tests.runs import write_config
from trainer.config import load
from trainer.experts import between
from trainer.model_card import Exported, card, in_comfyui, in_diffusers, record, texts
from trainer.student_facts import Facts, facts_of_run, from_header, known_facts
from utils.config import ConfigError

TOY = toy_config()
SIGMAS = step_sigmas([1000, 750, 500, 250], 5.0)
FEW = Facts(
    base="Wan2.1-T2V-1.3B",
    method="dmd",
    sampler="renoise",
    steps=4,
    shift=5.0,
    sigmas=SIGMAS,
    height=32,
    width=32,
    frames=5,
)
LORA = Exported("adapter", ["pytorch_lora_weights.safetensors"], "diffusers", rank=4)
PAIR = Exported(
    "adapter", ["high_noise_model.safetensors", "low_noise_model.safetensors"], "diffusers", rank=4
)
# T2V-A14B with shift 7, whose third level is the boundary of the release.
A14B = replace(
    FEW,
    base="Wan2.2-T2V-A14B",
    shift=7.0,
    sigmas=step_sigmas([1000, 750, 500, 250], 7.0),
    boundary=between(step_sigmas([1000, 750, 500, 250], 7.0), 0.875),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small release in diffusers' layout."""
    path = tmp_path_factory.mktemp("card")
    return make_diffusers(path / "theirs", make_official(path / "ours")).path


def run_code(code: str, base: Path, where: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a card's Python beside the files that it is about; returns what it left.

    `levels` are the timesteps of its steps, `frames` its latents.
    """
    monkeypatch.chdir(where)
    for old, new in (
        (repr("Wan-AI/Wan2.1-T2V-1.3B-Diffusers"), repr(str(base))),
        (repr("Wan-AI/Wan2.2-T2V-A14B-Diffusers"), repr(str(base))),
        ("torch.bfloat16", "torch.float32"),
        ("'cuda'", "'cpu'"),
        (").frames", "    output_type='latent', callback_on_step_end=seen\n).frames"),
    ):
        code = code.replace(old, new)
    levels: list[float] = []

    def seen(pipe: Any, step: int, timestep: Tensor, values: Any) -> dict[str, Any]:
        levels.append(float(timestep))
        return {}

    space: dict[str, Any] = {"prompt": "a red circle", "seen": seen, "levels": levels}
    exec(compile(code, "card", "exec"), space)
    return space


def test_the_call_in_diffusers_samples_at_the_levels_of_the_student(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import UniPCMultistepScheduler

    factors = random_factors(layers_of(TOY), TOY)
    write_adapter(tmp_path / "few", factors)
    code = in_diffusers(FEW, LORA)
    assert code is not None
    space = run_code(code, folder, tmp_path / "few", monkeypatch)
    pipe, levels, made = space["pipe"], space["levels"], space["frames"]
    assert levels == pytest.approx([1000 * sigma for sigma in SIGMAS], rel=1e-6)
    assert pipe.get_active_adapters() == ["few"]
    whole = in_diffusers(FEW, Exported("model", [], "diffusers"))
    assert whole is not None
    state = merged(build_wan(TOY).state_dict(), AdapterFile(factors))
    pipe.unload_lora_weights()
    pipe.scheduler = UniPCMultistepScheduler()
    pipe.transformer = theirs(TOY, state)
    pipe.save_pretrained(tmp_path / "student")
    expected = run_code(whole, folder, tmp_path / "student", monkeypatch)["frames"]
    assert (made - expected).abs().max() < 1e-5


def test_a_student_without_fresh_noise_is_called_at_its_levels_too(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tmp_path / "few", random_factors(layers_of(TOY), TOY))
    code = in_diffusers(replace(FEW, sampler="euler"), LORA)
    assert code is not None
    space = run_code(code, folder, tmp_path / "few", monkeypatch)
    assert space["levels"] == pytest.approx([1000 * sigma for sigma in SIGMAS], rel=1e-6)
    scheduler = space["pipe"].scheduler
    scheduler.set_timesteps(4)
    x = torch.ones(1, 16, 2, 4, 4)
    after = scheduler.step(0.5 * x, scheduler.timesteps[0], x, return_dict=False)[0]
    assert torch.allclose(after, x + (SIGMAS[1] - SIGMAS[0]) * 0.5 * x, atol=1e-6)


def test_between_steps_the_card_adds_fresh_noise(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As pipeline/few_step.py does: predict x0, then noise it to the next level."""
    write_adapter(tmp_path / "few", random_factors(layers_of(TOY), TOY))
    code = in_diffusers(FEW, LORA)
    assert code is not None
    pipe = run_code(code, folder, tmp_path / "few", monkeypatch)["pipe"]
    scheduler, x = pipe.scheduler, torch.ones(1, 16, 2, 4, 4)
    scheduler.set_timesteps(4)
    velocity = torch.full_like(x, 0.5)
    torch.manual_seed(3)
    after = scheduler.step(velocity, scheduler.timesteps[0], x, return_dict=False)[0]
    torch.manual_seed(3)
    fresh = torch.randn(x.shape, generator=None)
    assert torch.allclose(after, (1 - SIGMAS[1]) * (x - 0.5) + SIGMAS[1] * fresh, atol=1e-6)


def test_a_step_on_the_boundary_is_the_low_experts_in_diffusers_too(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import UniPCMultistepScheduler, WanPipeline

    assert A14B.sigmas[2] == 0.875
    base = WanPipeline.from_pretrained(folder)
    state = build_wan(TOY).state_dict()
    pair = WanPipeline(
        **{**base.components, "transformer_2": theirs(TOY, state)}, boundary_ratio=0.875
    )
    pair.save_pretrained(tmp_path / "base")
    sides = {
        side: random_factors(layers_of(TOY), TOY, seed=i) for i, side in enumerate(("high", "low"))
    }
    factors = {f"{side}.{n}": pair for side, held in sides.items() for n, pair in held.items()}
    write_adapter(tmp_path / "few", factors)
    code = in_diffusers(A14B, PAIR)
    assert code is not None
    hook = """
calls = []
for name in ("transformer", "transformer_2"):
    getattr(pipe, name).register_forward_hook(lambda *_, name=name: calls.append(name))
"""
    code = code.replace("torch.manual_seed", f"{hook}torch.manual_seed")
    space = run_code(code, tmp_path / "base", tmp_path / "few", monkeypatch)
    pipe, made, calls = space["pipe"], space["frames"], space["calls"]
    assert calls == ["transformer", "transformer", "transformer_2", "transformer_2"]
    assert pipe.config.boundary_ratio == pytest.approx((0.9545454 + 0.875) / 2, rel=1e-6)
    whole = in_diffusers(A14B, Exported("model", [], "diffusers"))
    assert whole is not None
    pipe.unload_lora_weights()
    pipe.scheduler = UniPCMultistepScheduler()
    pipe.transformer = theirs(TOY, merged(state, AdapterFile(sides["high"])))
    pipe.transformer_2 = theirs(TOY, merged(state, AdapterFile(sides["low"])))
    pipe.save_pretrained(tmp_path / "student")
    expected = run_code(whole, folder, tmp_path / "student", monkeypatch)["frames"]
    assert (made - expected).abs().max() < 1e-5


@pytest.mark.parametrize("solver", ["unipc", "euler"])
def test_a_many_step_model_is_called_with_its_guidance_and_shift(
    solver: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tmp_path / "style", random_factors(layers_of(TOY), TOY))
    facts = replace(FEW, sampler=solver, sigmas=[], steps=3, cfg_scale=4.0, shift=3.0)
    code = in_diffusers(facts, LORA)
    assert code is not None
    space = run_code(code, folder, tmp_path / "style", monkeypatch)
    pipe, levels = space["pipe"], space["levels"]
    assert len(levels) == 3 and pipe.guidance_scale == 4.0
    shift = pipe.scheduler.config.flow_shift if solver == "unipc" else pipe.scheduler.config.shift
    assert shift == 3.0


# ---- words


def test_the_record_holds_all_facts_and_the_calls() -> None:
    held = json.loads(record(FEW, LORA))
    assert held["steps"] == 4 and held["sigmas"] == SIGMAS and held["shift"] == 5.0
    assert held["cfg_scale"] == 1.0 and held["lora_strength"] == 1.0 and held["boundary"] is None
    assert held["diffusers"] == in_diffusers(FEW, LORA)
    assert held["comfyui"] == in_comfyui(FEW, LORA)


def test_the_card_says_steps_shift_guidance_strength_and_base() -> None:
    page = card(replace(FEW, base_sha256="ab" * 32), LORA)
    for row in (
        "| steps | 4 |",
        "| noise levels | 1.0000, 0.9375, 0.8333, 0.6250 |",
        "| shift | 5 |",
        "| guidance (cfg_scale) | 1 |",
        "| LoRA strength | 1.0 |",
        "| rank | 4 |",
        "| clips | 32 x 32, 5 frames, 16 per second |",
        f"| base | Wan2.1-T2V-1.3B, sha256 {'ab' * 32} |",
    ):
        assert row in page.splitlines()
    front = yaml.safe_load(page.split("---")[1])
    assert front["license"] == "apache-2.0"
    assert front["base_model"] == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert front["base_model_relation"] == "adapter"
    assert front["tags"] == ["lora", "few-step", "distillation", "wan"]


def test_the_line_for_comfyui_says_what_its_nodes_are_set_to() -> None:
    assert in_comfyui(FEW, replace(LORA, layout="comfyui")) == (
        "LoraLoaderModelOnly strength 1.0; ModelSamplingSD3 shift 5; KSampler: steps 4, cfg 1, "
        "sampler lcm, scheduler simple."
    )
    line = in_comfyui(A14B, PAIR)
    assert line is not None
    assert "export it with --adapter_layout comfyui" in line
    assert line.endswith("high-noise model steps 0 to 2, low-noise model from 2.")


def test_the_boundary_of_two_experts_is_on_the_card() -> None:
    assert "| boundary between the experts | 0.9148 |" in card(A14B, PAIR).splitlines()


def test_a_causal_student_is_for_neither() -> None:
    page = card(replace(FEW, causal=True), LORA)
    assert "diffusers\n\n```python" not in page and "ComfyUI" not in page
    assert "python inference.py" in page


@pytest.mark.parametrize(
    ("shift", "boundary", "expected"),
    [
        (5.0, 0.875, (0.9375 + 0.8333333) / 2),
        (7.0, 0.875, (0.9545454 + 0.875) / 2),  # the third level is the boundary
        (9.0, 0.9, (0.9642857 + 0.9) / 2),
        (12.0, 0.9, (0.9230769 + 0.8) / 2),
    ],
)
def test_a_gate_lies_strictly_between_two_steps(
    shift: float, boundary: float, expected: float
) -> None:
    levels = step_sigmas([1000, 750, 500, 250], shift)
    found = between(levels, boundary)
    assert found == pytest.approx(expected, rel=1e-6)
    assert found not in levels
    assert between(levels, found) == found


# ---- where facts come from


def test_facts_travel_in_a_header_and_back() -> None:
    for facts in (FEW, A14B, replace(FEW, base_sha256="12345678", base="7", licence="true")):
        assert from_header({**facts.header(), "format": "pt"}) == facts
    assert from_header({"format": "pt"}) is None
    assert from_header({**FEW.header(), "steps": "many"}) is None


def test_facts_travel_in_a_record_and_back(tmp_path: Path) -> None:
    for name, text in texts(FEW, LORA).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert known_facts(tmp_path, {}) == FEW
    (tmp_path / "fewstep.json").write_text("[", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"fewstep\.json: not a record of a student"):
        known_facts(tmp_path, {})


def test_a_few_step_run_tells_of_itself(tiny_root: Path, tmp_path: Path) -> None:
    facts = facts_of_run(load(write_config(tmp_path, tiny_root, "dmd")))
    assert (facts.base, facts.method, facts.sampler) == ("Wan2.1-T2V-Tiny", "dmd", "renoise")
    assert (facts.steps, facts.shift, facts.sigmas, facts.cfg_scale) == (4, 5.0, SIGMAS, 1.0)
    assert (facts.height, facts.width, facts.frames, facts.fps) == (32, 32, 17, 16.0)
    assert facts.base_sha256 is not None and len(facts.base_sha256) == 64


def test_a_causal_run_tells_of_its_first_block(tiny_root: Path, tmp_path: Path) -> None:
    words = ["denoising_step_list=[1000,500]", "first_block_step_list=[1000,750,500,250]"]
    facts = facts_of_run(load(write_config(tmp_path, tiny_root, "self_forcing_dmd"), words))
    assert (facts.steps, facts.first_block_sigmas) == (2, SIGMAS)
    assert from_header(facts.header()) == facts
    page = card(facts, LORA)
    assert "| noise levels of the first block | 1.0000, 0.9375, 0.8333, 0.6250 |" in page
    assert (
        "needs 2 steps with guidance off: an adapter for Wan2.1-T2V-Tiny (its first block in 4"
        in page
    )


def test_a_many_step_run_tells_of_itself(tiny_root: Path, tmp_path: Path) -> None:
    facts = facts_of_run(load(write_config(tmp_path, tiny_root, "diffusion")))
    assert (facts.method, facts.sampler, facts.steps) == ("diffusion", "euler", 2)
    assert (facts.sigmas, facts.cfg_scale) == ([], 2.0)


def test_a_run_tells_of_itself_where_its_model_is_not(tiny_root: Path, tmp_path: Path) -> None:
    config = load(write_config(tmp_path, tiny_root, "self_forcing_dmd"), ["model_root=nowhere"])
    facts = facts_of_run(config)
    assert (facts.base, facts.steps, facts.causal) == ("Wan2.1-T2V-Tiny", 4, True)
    assert (facts.height, facts.base_sha256) == (None, None)
