"""Runs of parallel decoding distillation: what they hold, how they are served and exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import convert_checkpoint
from model.types import Conditioning
from model.wan.heads import BIAS, PLAIN_BIAS, PLAIN_WEIGHT, WEIGHT
from pipeline.protocol import sample
from tests.commands import own_logging
from tests.commands import refusal as said_by
from tests.ranks import run_on_ranks
from tests.runs import build, built, read_state, refusal, rows, run, step_folder, write_config
from trainer.config import load
from trainer.serving import check_source, load_generator
from utils.distributed import distributed_session
from utils.errors import UserError
from utils.seeding import generator as keyed
from utils.seeding import sample_rng
from utils.weights import WeightFile

__all__ = ["own_logging"]

ADAPTER = "generator.adapter.rank=2"
TWO = "denoising_step_list=[1000,500]"
SHORT = ("steps=2", "ema.start_step=0", "log_every=1")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_root: Path) -> Path:
    return write_config(tmp_path_factory.mktemp("pdd"), tiny_root, "pdd")


@pytest.fixture(scope="module", params=["whole", "adapter"])
def student(request: pytest.FixtureRequest, config: Path) -> Path:
    """A run of two steps with probes and pictures, of whole weights and of an adapter."""
    words = (ADAPTER,) if request.param == "adapter" else ()
    logdir = config.parent / request.param
    probed = ("health.every=2", "health.count=2", "validation.every=2", "validation.count=2")
    return run(config, logdir, *SHORT, *words, *probed)


def clip(config: Path, path: Path, *overrides: str, size: int = 2) -> Tensor:
    """Latents that are served from what lies at `path`."""
    settings = load(config, overrides)
    source = check_source(settings, path, use_ema=None)
    served, read = load_generator(source, CPU), source.model.text
    text = Conditioning(torch.randn(size, read.length, read.width, generator=keyed("text")))
    rng = sample_rng(0, "clip", range(size), CPU)
    with torch.no_grad():
        return sample(served.pipeline, text, text, settings.latent_shape, rng)


def convert(source: Path, target: Path, *words: str) -> int:
    return convert_checkpoint.main(
        ["--input_path", str(source), "--output_path", str(target), *words]
    )


def base_of(config: Path) -> Path:
    settings = load(config)
    return Path(settings.model_root) / "Wan2.1-T2V-Tiny"


def export(student: Path, config: Path, target: Path, *words: str) -> None:
    """Write a student: an adapter merged into its base, a whole one as it is."""
    if student.name == "adapter":
        assert convert(base_of(config), target, "--adapter", str(student), *words) == 0
    else:
        assert convert(student, target, "--use_ema", *words) == 0


def test_a_run_shows_and_probes_its_fused_heads(student: Path) -> None:
    assert (student / "samples" / "step_000002.png").is_file()
    assert (student / "health.jsonl").read_text(encoding="utf-8").count("\n") == 1


@pytest.mark.parametrize("steps", [2, 4])
def test_an_exported_student_makes_the_clips_of_its_run_bit_for_bit(
    steps: int, student: Path, config: Path, tmp_path: Path
) -> None:
    listed = [] if steps == 4 else [TWO]
    export(student, config, tmp_path / "student.safetensors", "--fuse_steps", str(steps))
    held = WeightFile(tmp_path / "student.safetensors").shapes()
    assert held[WEIGHT][0] == held[BIAS][0] == steps
    assert PLAIN_WEIGHT not in held and PLAIN_BIAS not in held
    exported = clip(config, tmp_path / "student.safetensors", *listed)
    of_run = clip(config, student, *listed)
    if student.name == "whole":
        assert torch.equal(exported, of_run)
    else:  # the adapter is merged, which rounds
        torch.testing.assert_close(exported, of_run, rtol=1e-4, atol=1e-4)


def test_a_folder_of_a_student_is_served_as_its_file(
    student: Path, config: Path, tmp_path: Path
) -> None:
    layout = ("--layout", "official", "--model_folder", str(base_of(config)))
    export(student, config, tmp_path / "folder", *layout)
    export(student, config, tmp_path / "file.safetensors")
    folder, file = (clip(config, tmp_path / name) for name in ("folder", "file.safetensors"))
    assert torch.equal(folder, file)


def test_the_card_tells_the_noise_levels_of_the_fused_steps(
    student: Path, config: Path, tmp_path: Path
) -> None:
    export(student, config, tmp_path / "two.safetensors", "--fuse_steps", "2")
    record = json.loads((tmp_path / "two.fewstep.json").read_text(encoding="utf-8"))
    assert (record["method"], record["sampler"], record["steps"]) == ("pdd", "euler", 2)
    assert record["sigmas"] == [1.0, pytest.approx(5.0 / 6.0)]
    assert record["diffusers"] is None and record["comfyui"] is None


def test_heads_begin_as_copies_of_the_teachers_and_then_move_apart(
    config: Path, tmp_path: Path
) -> None:
    teacher = WeightFile(base_of(config) / "diffusion_pytorch_model.safetensors")
    for words in ((), (ADAPTER,)):
        with built(config, tmp_path / f"run{len(words)}", *words) as trainer:
            held = trainer.roles["generator"].module.state_dict()
            for name, plain in ((WEIGHT, PLAIN_WEIGHT), (BIAS, PLAIN_BIAS)):
                copies = teacher.read(plain).float().expand_as(held[name])
                assert torch.equal(held[name], copies)
            assert (PLAIN_WEIGHT in held) == bool(words)
            trainer.train()
            assert not torch.equal(held[WEIGHT][0], held[WEIGHT][1])


def test_heads_learn_at_a_rate_of_their_own(config: Path, tmp_path: Path) -> None:
    words = ("loss.head_rate=0.25", "generator.warmup_updates=0", "generator.schedule=constant")
    with built(config, tmp_path / "run", *words) as trainer:
        trainer.roles["generator"].step(0, 4)
        bank = trainer.roles["generator"].module.get_parameter(WEIGHT)
        rates = {
            any(p is bank for p in group["params"]): group["lr"]
            for group in trainer.roles["generator"].optimizers[0].param_groups
        }
    assert rates[True] == pytest.approx(0.25 * 1e-3)


def test_a_checkpoint_holds_heads_and_their_average_and_no_state_of_paths(student: Path) -> None:
    state = read_state(step_folder(student, 2))
    for name in (WEIGHT, BIAS):
        assert len(state[f"roles.generator.{name}"]) == len(state[f"ema.generator.{name}"]) == 8
    kinds = {name.partition(".")[0] for name in state}
    assert kinds == {"roles", "optim", "ema", "state"}


@pytest.mark.parametrize(
    "words",
    [
        ("parallel.activation_checkpoint=block",),
        ("accumulation=2",),
        ("loss.batched_guidance=false",),
        pytest.param(("parallel.activation_checkpoint=block", ADAPTER), marks=pytest.mark.slow),
    ],
    ids=["recomputed", "micro-batches", "guided one by one", "adapter recomputed"],
)
def test_how_a_step_is_computed_changes_no_loss(
    words: tuple[str, ...], config: Path, tmp_path: Path
) -> None:
    same = [word for word in words if word == ADAPTER]
    plain = rows(run(config, tmp_path / "plain", *SHORT, *same))
    other = rows(run(config, tmp_path / "other", *SHORT, *words))
    for one, two in zip(plain, other, strict=True):
        assert two == {key: pytest.approx(value, rel=2e-6) for key, value in one.items()}


def test_heads_are_fp32_where_the_network_computes_in_bf16(config: Path, tmp_path: Path) -> None:
    for words in ((), (ADAPTER,)):
        with built(config, tmp_path / f"run{len(words)}", "mixed_precision=true", *words) as it:
            seen = []
            bank = it.roles["generator"].module.get_submodule("head.bank")
            bank.register_forward_hook(
                lambda m, given, out, seen=seen: seen.append(
                    (m.weight.dtype, given[0].dtype, out.dtype)
                )
            )
            it.train()
        assert set(seen) == {(torch.float32,) * 3}


def train_on_ranks(config: Path, logdir: Path, words: tuple[str, ...]) -> None:
    with distributed_session(timeout_s=60.0) as session:
        build(config, logdir, session, *words).train()


# Base and heads are sharded, whole or cast, each in its own way.
LAYOUTS = {
    "adapter": ((ADAPTER,), 2e-5),
    "adapter on a whole base": ((ADAPTER, "teacher.sharded=false"), 2e-5),
    "bf16": (("mixed_precision=true",), 0.05),
    "adapter, bf16, whole": (("mixed_precision=true", ADAPTER, "teacher.sharded=false"), 0.05),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_rank_and_two_agree_however_heads_and_network_lie(
    layout: str, config: Path, tmp_path: Path
) -> None:
    words, tolerance = LAYOUTS[layout]
    words = (*SHORT, *words)
    alone = rows(run(config, tmp_path / "1", *words))
    run_on_ranks(2, train_on_ranks, config, tmp_path / "2", words)
    for one, two in zip(alone, rows(tmp_path / "2"), strict=True):
        assert two == {key: pytest.approx(value, rel=tolerance) for key, value in one.items()}


# ---- refusals


def test_a_run_goes_on_with_an_adapter_and_the_heads_that_it_has(
    config: Path, tmp_path: Path
) -> None:
    first = run(config, tmp_path / "first", *SHORT, ADAPTER)
    begin = f"generator.adapter.weights={first}"
    with built(config, tmp_path / "second", ADAPTER, begin) as trainer:
        held = trainer.roles["generator"].module.get_parameter(WEIGHT)
        averaged = read_state(step_folder(first, 2))[f"ema.generator.{WEIGHT}"]
        assert torch.equal(held, averaged)


def test_heads_of_another_number_are_refused(config: Path, student: Path, tmp_path: Path) -> None:
    if student.name == "adapter":
        words = (ADAPTER, f"generator.adapter.weights={student}")
    else:
        words = (f"generator.weights={student}",)
    said = refusal(config, tmp_path, *words, "loss.grid=16")
    assert "8 heads for the parts of a path, and loss.grid asks for 16; set loss.grid=8" in said


def test_no_other_method_begins_with_heads_of_a_path(
    student: Path, config: Path, tiny_root: Path, tmp_path: Path
) -> None:
    other = write_config(tmp_path, tiny_root, "dmd")
    if student.name == "adapter":
        words = (ADAPTER, f"generator.adapter.weights={student}")
        assert "which this run's method does not ask" in refusal(other, tmp_path, *words)
        added = refusal(other, tmp_path, ADAPTER, f"generator.adapters=[{student}]")
        assert "roles that share a network cannot add them" in added
    else:
        said = refusal(other, tmp_path, f"generator.weights={student}")
        assert said.startswith(f"generator: {student}") and "use distribution_loss: pdd" in said
    with pytest.raises(UserError, match="only a student of that method is asked for"):
        check_source(load(other), student, use_ema=None)


def test_a_student_is_not_served_in_steps_that_its_heads_do_not_have(
    student: Path, config: Path, tmp_path: Path
) -> None:
    export(student, config, tmp_path / "two.safetensors", "--fuse_steps", "2")
    with pytest.raises(UserError, match="its 2 heads cannot be walked in 4 calls; use a divisor"):
        check_source(load(config), tmp_path / "two.safetensors", use_ema=None)
    with pytest.raises(UserError, match="has one head for all noise levels, and nothing to fuse"):
        check_source(load(config), base_of(config), use_ema=None)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("generator.random_init=true", "begin as copies of one that has learnt"),
        ("generator_type=causal", "causal is not for distribution_loss: pdd"),
        ("denoising_step_list=[1000,250]", "a path is walked in equal steps"),
        ("loss.gan_weight=0.1", "loss.gan_weight"),
        ("loss.uncond_skips=[1,7]", "the teacher has blocks 0 to 1, and no 7; leave out one"),
    ],
)
def test_settings_without_meaning_are_refused(
    word: str, said: str, config: Path, tmp_path: Path
) -> None:
    assert said in refusal(config, tmp_path, word)


def test_adapters_of_the_last_layer_are_refused(config: Path, tmp_path: Path) -> None:
    word = "generator.adapter.targets=blocks+embeddings"
    said = refusal(config, tmp_path, ADAPTER, word)
    assert "pdd has heads of its own; set it to blocks" in said


def test_exports_that_cannot_hold_a_head_per_step_are_refused(
    student: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out.safetensors"
    source = ["--input_path", str(student), "--use_ema"]
    if student.name == "adapter":
        words = ["--input_path", str(student), "--adapter_layout", "comfyui"]
        said = said_by(convert_checkpoint.main, [*words, "--output_path", str(target)], capsys)
        assert "no file of an adapter has a place for them; merge it" in said
        source = ["--input_path", str(base_of(config)), "--adapter", str(student)]
    words = [*source, "--output_path", str(target)]
    said = said_by(convert_checkpoint.main, [*words, "--naming", "diffusers"], capsys)
    assert "a last layer for each of its steps, of which a transformer of diffusers has one" in said
    said = said_by(convert_checkpoint.main, [*words, "--fuse_steps", "3"], capsys)
    assert "its 8 heads cannot be walked in 3 calls; use a divisor: 1, 2, 4, 8" in said
    assert not target.exists()


def test_weights_with_one_head_have_nothing_to_fuse(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--input_path", str(base_of(config)), "--output_path", str(tmp_path / "a.pt")]
    said = said_by(convert_checkpoint.main, [*words, "--fuse_steps", "4"], capsys)
    assert "--fuse_steps 4" in said and "nothing to fuse" in said
