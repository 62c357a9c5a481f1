"""Runs of two experts: what they train, save, resume and are served as."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from model.experts import ExpertPair
from model.flow import step_sigmas
from pipeline.request import Request
from tests.ranks import run_on_ranks
from tests.runs import (
    OPTIMIZER,
    assert_same_end,
    build,
    built,
    cut_after,
    read_state,
    rows,
    run,
    step_folder,
    unequal,
)
from trainer.config import load
from trainer.experts import check_offload
from trainer.run import Run, resolve
from trainer.serving import capabilities, check_source, load_generator
from trainer.teams import Team, check_team
from utils.config import ConfigError
from utils.distributed import distributed_session
from utils.errors import UserError

CPU = torch.device("cpu")
PAIR = "Wan2.2-T2V-A14B-Tiny"
COMMON = """
generator: {model: MODEL, OPTIMIZER}
critic: {OPTIMIZER}
ema: {decay: 0.5, start_step: 0}
mixed_precision: false
latent_shape: [16, 5, 4, 4]
timestep_shift: 7.0
steps: 4
batch_size: 2
logging: {wandb: false}
log_every: 1
save_every: 2
keep_checkpoints: 10
timeout_s: 60
"""
METHODS = {
    "dmd": "trainer: score_distillation\nloss: {cfg_scale: 2.0, generator_every: 1}\n"
    "data: {path: ROOT/data/tiny/prompts.txt}",
    "sid": "trainer: score_distillation\ndistribution_loss: sid\n"
    "loss: {cfg_scale: 2.0, generator_every: 1}\ndata: {path: ROOT/data/tiny/prompts.txt}",
    "phased_dmd": "trainer: score_distillation\ndistribution_loss: phased_dmd\n"
    "loss: {cfg_scale: 2.0, cfg_scale_low: 1.5, generator_every: 1}\n"
    "data: {path: ROOT/data/tiny/prompts.txt}",
    "diffusion": "trainer: diffusion\ndata: {path: ROOT/data/tiny/latents}\n"
    "sampling: {steps: 3, cfg_scale: 2.0, cfg_scale_low: 1.5, solver: euler}",
    "consistency": "trainer: ode\ndistribution_loss: consistency\nloss: {cfg_scale: 2.0}\n"
    "data: {path: ROOT/data/tiny/latents}",
    "ode": "trainer: ode\ndata: {path: ROOT/data/tiny/ode_pairs}\ntimestep_shift: 5.0",
}


@pytest.fixture(scope="session")
def paired_configs(tmp_path_factory: pytest.TempPathFactory, experts_root: Path) -> dict[str, Path]:
    """A small run of each method on the tiny world of two experts."""
    folder, found = tmp_path_factory.mktemp("paired"), {}
    for name, text in METHODS.items():
        common = COMMON if name != "ode" else COMMON.replace("timestep_shift: 7.0\n", "")
        whole = f"{text}\nmodel_root: ROOT/wan_models\n{common}"
        for word, value in (("ROOT", str(experts_root)), ("MODEL", PAIR), ("OPTIMIZER", OPTIMIZER)):
            whole = whole.replace(word, value)
        found[name] = folder / f"{name}.yaml"
        found[name].write_text(whole, encoding="utf-8")
    return found


def run_of(path: Path, *overrides: str) -> Run:
    return resolve(load(path, overrides))


def moved(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """The roles whose weights differ, experts apart."""
    changed = [key for key in unequal(before, after) if key.startswith("roles.")]
    return {".".join(key.split(".")[1:3]) for key in changed}


FAST = ("dmd",)


@pytest.mark.parametrize(
    "name",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in METHODS],
)
def test_every_method_trains_both_experts_and_resumes_bit_for_bit(
    name: str, paired_configs: dict[str, Path], tmp_path: Path
) -> None:
    words = ["loss.phase=both"] if name == "phased_dmd" else []
    whole = run(paired_configs[name], tmp_path / "whole", *words)
    parts = run(paired_configs[name], cut_after(whole, tmp_path / "parts", 2), *words)
    assert_same_end(whole, parts, step=4)
    state = read_state(step_folder(whole, 4))
    updates = {k.removeprefix("state.updates."): int(v) for k, v in state.items() if "updates" in k}
    trained = (
        ("generator", "critic") if any("critic" in role for role in updates) else ("generator",)
    )
    assert set(updates) == {f"{role}.{side}" for role in trained for side in ("high", "low")}
    for role in trained:
        assert sum(updates[f"{role}.{side}"] for side in ("high", "low")) == 4


def test_an_expert_that_got_no_gradient_is_not_stepped(
    paired_configs: dict[str, Path], tmp_path: Path
) -> None:
    run(paired_configs["diffusion"], tmp_path, "save_every=1", "steps=6")
    states = [read_state(step_folder(tmp_path, step)) for step in range(1, 7)]
    sides = set()
    for before, after in pairwise(states):
        (one,) = moved(before, after)
        sides.add(one)
        other = "generator.low" if one == "generator.high" else "generator.high"
        still = [k for k in unequal(before, after) if f".{other}." in f"{k}."]
        assert still == []  # nor its optimizer, nor its average, nor its count
    assert sides == {"generator.high", "generator.low"}


def test_one_expert_trains_under_plain_names_in_its_own_interval(
    paired_configs: dict[str, Path], tmp_path: Path
) -> None:
    words = ("generator.experts=low", "sampling.cfg_scale_low=null", "steps=1")
    run(paired_configs["diffusion"], tmp_path, *words)
    state = read_state(step_folder(tmp_path, 1))
    assert "roles.generator.blocks.0.self_attn.q.weight" in state
    resolved = run_of(
        paired_configs["diffusion"], "generator.experts=low", "sampling.cfg_scale_low=null"
    )
    assert resolved.experts is not None
    assert (resolved.experts.sides, resolved.experts.boundary) == (("low",), 0.875)


@pytest.fixture(scope="module")
def phases(paired_configs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A high phase, and a low one behind it."""
    folder, path = tmp_path_factory.mktemp("phases"), paired_configs["phased_dmd"]
    alone = [f"{role}.experts=high" for role in ("generator", "critic", "teacher")]
    run(path, folder / "high", *alone)
    run(path, folder / "low", "loss.phase=low", f"generator.weights_high={folder / 'high'}")
    return folder


def test_the_low_phase_keeps_the_high_student_and_moves_the_low_one(phases: Path) -> None:
    before, after = (read_state(step_folder(phases / "low", step)) for step in (2, 4))
    assert "generator.low" in moved(before, after)
    assert moved(before, after) <= {"generator.low", "critic.high", "critic.low"}
    assert not any(key.startswith("roles.generator.high") for key in after)


def test_the_expert_that_a_phase_keeps_is_stored_as_it_computes(
    phases: Path, paired_configs: dict[str, Path], tmp_path: Path
) -> None:
    words = ["loss.phase=low", f"generator.weights_high={phases / 'high'}", "mixed_precision=true"]
    with built(paired_configs["phased_dmd"], tmp_path, *words) as trainer:
        pair = trainer.method.generator.model
        kinds = {side: {p.dtype for p in pair[side].parameters()} for side in ("high", "low")}
        assert kinds == {"high": {torch.bfloat16}, "low": {torch.float32}}
        assert not any(p.requires_grad for p in pair["high"].parameters())
        trainer.train()


def test_a_low_phase_is_served_behind_the_high_student_that_it_was_trained_behind(
    phases: Path, paired_configs: dict[str, Path]
) -> None:
    words = ["loss.phase=low", f"generator.weights_high={phases / 'high'}"]
    source = check_source(load(paired_configs["phased_dmd"], words), phases / "low", use_ema=False)
    generator = load_generator(source, CPU)
    net = generator.network
    assert isinstance(net, ExpertPair)
    sigmas = step_sigmas([1000, 750, 500, 250], 7.0)
    assert net.boundary == pytest.approx((sigmas[1] + sigmas[2]) / 2)
    high = read_state(step_folder(phases / "high", 4))
    low = read_state(step_folder(phases / "low", 4))
    for name, value in net.model["high"].state_dict().items():
        assert torch.equal(value, high[f"roles.generator.{name}"])
    for name, value in net.model["low"].state_dict().items():
        assert torch.equal(value, low[f"roles.generator.low.{name}"])
    assert generator.latents([Request("a red circle moves right quickly")]).isfinite().all()


def test_a_high_phase_alone_is_served_in_its_own_steps(
    phases: Path, paired_configs: dict[str, Path]
) -> None:
    alone = [f"{role}.experts=high" for role in ("generator", "critic", "teacher")]
    source = check_source(load(paired_configs["phased_dmd"], alone), phases / "high", use_ema=True)
    assert source.run.few_steps == pytest.approx(step_sigmas([1000, 750], 7.0))
    generator = load_generator(source, CPU)
    assert generator.capabilities.steps == 2
    assert generator.latents([Request("a red circle moves right quickly")]).isfinite().all()


def test_a_student_stores_where_its_experts_meet(
    paired_configs: dict[str, Path], tmp_path: Path
) -> None:
    resolved = run_of(paired_configs["dmd"])
    assert resolved.gate == resolved.config.sampling.boundary == pytest.approx(0.9148, abs=1e-4)
    assert resolved.experts is not None
    assert resolved.experts.boundary == 0.875  # of the teacher in losses
    run(paired_configs["dmd"], tmp_path, "steps=1")
    stored = load(tmp_path / "checkpoints" / "step_000001" / "config.yaml")
    assert stored.sampling.boundary == resolved.gate
    assert run_of(paired_configs["diffusion"]).gate == 0.875


@pytest.mark.parametrize(
    ("name", "words", "told"),
    [
        ("dmd", ["sampling.boundary=0.875"],
         "must lie strictly between two of the student's noise levels 1, 0.9545, 0.875, 0.7, got "
         "0.875; use 0.9773 or 0.9148 or 0.7875, or null"),
        ("dmd", ["sampling.boundary=0.5"], "must lie strictly between two"),
        ("dmd", ["denoising_step_list=[1000,750]"],
         "none of the noise levels 1, 0.9545 is at or below 0.875, where the low expert begins"),
        ("dmd", ["generator_type=causal", "causal.num_frame_per_block=2",
                 "causal.independent_first_frame=true"],
         "generator_type: causal is not for models of two experts, as the generator's"),
        ("dmd", ["loss.gan_weight=0.5", "data.path=ROOT/data/tiny/latents"],
         "a discriminator reads the features of one network, and the teacher is of two experts"),
        ("dmd", ["loss.max_sigma=0.8"], "has no noise level of the high expert"),
        ("dmd", ["generator.weights_high=x", "generator.experts=high"],
         "generator.weights_high: has no effect with generator.experts=high, one network; set "),
        ("dmd", ["generator.weights_low=x", "generator.random_init=true"],
         "generator.weights_low: cannot be given together with generator.random_init"),
        ("phased_dmd", ["loss.phase=low", "generator.experts=low"],
         "generator.experts: loss.phase=low needs the high expert of the generator"),
        ("consistency", ["teacher.experts=high"], "has no target to be consistent with"),
        ("dmd", ["generator.model=SINGLE", "loss.cfg_scale_low=2.0"],
         "loss.cfg_scale_low: is for models of two experts; the teacher's"),
        ("dmd", ["generator.model=SINGLE", "sampling.boundary=0.9"],
         "sampling.boundary: is for two experts, and the generator has one network"),
        ("dmd", ["generator.model=SINGLE", "generator.experts=high"],
         "with one network for all noise levels, of which none is the high one"),
        ("phased_dmd", ["generator.model=SINGLE", "loss.cfg_scale_low=null"],
         "phased_dmd is for teachers of two experts"),
    ],
)  # fmt: skip
def test_what_experts_cannot_do_is_told_before_weights_are_read(
    name: str, words: list[str], told: str, paired_configs: dict[str, Path], tiny_root: Path
) -> None:
    single = str(tiny_root / "wan_models" / "Wan2.1-T2V-Tiny")
    words = [word.replace("SINGLE", single).replace("ROOT", str(tiny_root)) for word in words]
    with pytest.raises((ConfigError, UserError)) as caught:
        run_of(paired_configs[name], *words)
    assert told in str(caught.value)


def test_roles_on_one_network_each_may_learn_from_a_teacher_of_two(
    paired_configs: dict[str, Path], tmp_path: Path
) -> None:
    words = ("generator.experts=low", "critic.experts=low", "steps=2")
    run(paired_configs["dmd"], tmp_path, *words)
    resolved = run_of(paired_configs["dmd"], *words)
    assert resolved.experts is not None
    assert resolved.experts.sides == ("high", "low")
    assert resolved.gate is None


def test_the_wrong_boundary_of_a_resumed_run_is_told(
    paired_configs: dict[str, Path], tmp_path: Path
) -> None:
    run(paired_configs["dmd"], tmp_path, "steps=2")
    with (
        pytest.raises(ConfigError, match=r"sampling\.boundary: is 0\.9147.*, now 0\.97"),
        built(paired_configs["dmd"], tmp_path, "sampling.boundary=0.97"),
    ):
        pass


OFFLOAD = "parallel.offload_idle_expert=true"


def test_an_idle_expert_that_waits_in_host_memory_changes_no_number(
    paired_configs: dict[str, Path], tmp_path: Path
) -> None:
    here = run(paired_configs["dmd"], tmp_path / "here", "steps=2")
    with built(paired_configs["dmd"], tmp_path / "waiting", "steps=2", OFFLOAD) as trainer:
        assert trainer.parts.run.offloaded == ["teacher"]
        trainer.train()
    assert rows(here) == rows(tmp_path / "waiting")


def test_waiting_needs_two_experts_that_stay_and_are_whole(
    paired_configs: dict[str, Path],
) -> None:
    with pytest.raises(ConfigError, match="no role here has any"):
        run_of(paired_configs["diffusion"], OFFLOAD)
    config = run_of(paired_configs["dmd"], OFFLOAD).config
    with pytest.raises(ConfigError, match="experts of the teacher are sharded over 2 ranks"):
        check_offload(config, ["teacher"], 2)
    check_offload(config, ["teacher"], 1)
    whole = run_of(paired_configs["dmd"], OFFLOAD, "teacher.sharded=false").config
    check_offload(whole, ["teacher"], 2)


def test_both_experts_are_served_in_turns(
    paired_configs: dict[str, Path], experts_root: Path
) -> None:
    folder, clips = experts_root / "wan_models" / PAIR, []
    for words in ([], [OFFLOAD]):
        source = check_source(load(paired_configs["diffusion"], words), folder, use_ema=None)
        generator = load_generator(source, CPU)
        clips.append(generator.latents([Request("a red circle moves right quickly")]))
    assert torch.equal(*clips)


ADAPTERS = ("generator.adapter.rank=4", "critic.adapter.rank=4")


def test_adapters_on_two_experts_have_a_role_for_each_and_their_base_stays(
    paired_configs: dict[str, Path], tmp_path: Path
) -> None:
    whole = run(paired_configs["dmd"], tmp_path / "whole", *ADAPTERS)
    parts = run(paired_configs["dmd"], cut_after(whole, tmp_path / "parts", 2), *ADAPTERS)
    assert_same_end(whole, parts, step=4)
    state = read_state(step_folder(whole, 4))
    kept = [key for key in state if key.startswith(("roles.", "ema."))]
    assert kept
    assert all(".adapters." in key for key in kept)
    assert {".".join(key.split(".")[:3]) for key in kept} == {
        f"{where}.{side}"
        for where in ("roles.generator", "roles.critic", "ema.generator")
        for side in ("high", "low")
    }


def test_a_shared_base_takes_turns_and_its_adapters_stay(
    paired_configs: dict[str, Path], tmp_path: Path
) -> None:
    here = run(paired_configs["dmd"], tmp_path / "here", *ADAPTERS, "steps=2")
    waiting = run(paired_configs["dmd"], tmp_path / "waiting", *ADAPTERS, "steps=2", OFFLOAD)
    assert rows(here) == rows(waiting)


def test_the_low_phase_stands_on_the_adapter_of_the_high_one(
    paired_configs: dict[str, Path], tmp_path: Path
) -> None:
    alone = [f"{role}.experts=high" for role in ("generator", "critic", "teacher")]
    path = paired_configs["phased_dmd"]
    run(path, tmp_path / "high", *alone, *ADAPTERS, "steps=2")
    words = ["loss.phase=low", f"generator.adapters=[high={tmp_path / 'high'}]", *ADAPTERS]
    run(path, tmp_path / "low", *words, "steps=2")
    state = read_state(step_folder(tmp_path / "low", 2))
    own = {".".join(key.split(".")[:3]) for key in state if key.startswith("roles.")}
    assert own == {"roles.generator.low", "roles.critic.high", "roles.critic.low"}
    source = check_source(load(path, words), tmp_path / "low", use_ema=False)
    generator = load_generator(source, CPU)
    factors = {
        side: [
            name for name in generator.network.state_dict() if f".{side}." in name and ".a" in name
        ]
        for side in ("high", "low")
    }
    assert all(factors.values())
    high = read_state(step_folder(tmp_path / "high", 2))
    served = dict(generator.network.state_dict().items())
    for name, value in high.items():
        if name.startswith("ema.generator.") and name.endswith(".b"):
            layer = name.removeprefix("ema.generator.").partition(".adapters.")[0]
            held = [
                v for n, v in served.items() if f"high.{layer}.adapters" in n and n.endswith(".b")
            ]
            assert any(torch.equal(value, one) for one in held)
    assert generator.latents([Request("a red circle moves right quickly")]).isfinite().all()


Job = tuple[Path, Path, tuple[str, ...]]  # configuration, log directory, overrides


def train_all(jobs: Sequence[Job]) -> None:
    """Train several runs in one process group."""
    with distributed_session(timeout_s=60.0) as session:
        for path, logdir, overrides in jobs:
            build(path, logdir, session, *overrides).train()


@pytest.mark.slow
def test_two_ranks_train_two_experts_as_one_rank_does(
    paired_configs: dict[str, Path], tmp_path: Path
) -> None:
    cases: dict[str, tuple[str, ...]] = {
        "dmd": (), "diffusion": ("accumulation=1",), "phased_dmd": ("loss.phase=both",),
        "sid": ADAPTERS,
    }  # fmt: skip
    jobs = [(paired_configs[name], tmp_path / "two" / name, words) for name, words in cases.items()]
    run_on_ranks(2, train_all, jobs)
    for name, words in cases.items():
        alone = rows(run(paired_configs[name], tmp_path / "one" / name, *words))
        both = rows(tmp_path / "two" / name)
        assert [row.keys() for row in both] == [row.keys() for row in alone]
        found = [(one[key], two[key]) for one, two in zip(alone, both, strict=True) for key in one]
        worst = max(abs(a - b) / max(abs(a), 1e-6) for a, b in found)
        print(f"{name}: 2 ranks are within {worst:.1e} of one")
        assert worst < 1e-5


@pytest.mark.parametrize(("high", "low"), [(2.0, 1.0), (1.0, 2.0)])
def test_guidance_of_one_expert_alone_is_not_divided_over_ranks(
    high: float, low: float, paired_configs: dict[str, Path]
) -> None:
    words = (f"sampling.cfg_scale={high}", f"sampling.cfg_scale_low={low}")
    model = capabilities(run_of(paired_configs["diffusion"], *words), CPU)
    team, shared = Team(context=1, cfg_parallel=True), Request("a red circle")
    with pytest.raises(ConfigError, match="--cfg_parallel: these clips are made without guidance"):
        check_team(team, model, 2, shared, [(32, 32)])
