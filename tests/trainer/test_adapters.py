"""Roles as adapters on one frozen network: losses, projected gradients, exact resumption."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.adapters import OnAdapters, pairs
from model.folders.adapter_files import LowRank, read_adapter
from model.folders.adapter_writing import write_adapter
from model.wan.heads import BIAS, WEIGHT
from tests.ranks import run_on_ranks
from tests.runs import (
    CONFIGS,
    assert_same_end,
    build,
    built,
    cut_after,
    read_state,
    refusal,
    rows,
    run,
    step_folder,
)
from trainer.base import Trainer
from trainer.config import load
from utils.config import ConfigError
from utils.distributed import distributed_session
from utils.weights import write_weights

BOTH = ("generator.adapter.rank=3", "critic.adapter.rank=2")
ALL_LAYERS = ("generator.adapter.targets=blocks+embeddings",)
Factors = dict[str, dict[str, tuple[Tensor, Tensor]]]  # role -> layer -> a, b

RELATIVE = 1e-6  # of a loss
GRADIENT = 1e-6  # of a role's gradients as one vector: fp32 through four layers


def overrides(method: str) -> tuple[str, ...]:
    """What makes adapters of all that a method trains."""
    has_critic = "score_distillation" in CONFIGS[method]
    words = BOTH if has_critic else BOTH[:1]
    return (*words, "loss.critic_pull=0") if method == "dmd_fdistill" else words


def give_values(trainer: Trainer) -> None:
    """Values to all adapters, of a size that matters."""
    for role in trainer.roles:
        for layer, name, pair in pairs(trainer.roles[role].module):
            rng = torch.Generator().manual_seed(len(layer) + 100 * len(name))
            for factor in (pair.a, pair.b):
                factor.data = 0.2 * torch.randn(factor.shape, generator=rng)


def deltas(trainer: Trainer) -> Factors:
    """Each role's factors by layer."""
    return {
        role: {
            layer: (pair.a.detach().clone(), pair.b.detach().clone())
            for layer, name, pair in pairs(held.module)
            if name == role
        }
        for role, held in trainer.roles.items()
    }


def step_gradients(trainer: Trainer) -> Iterator[tuple[str, float, dict[str, Tensor]]]:
    """For each phase of step 2, at which all move: role, loss, gradients by name."""
    for phase in trainer.phases(2):
        with trainer.only_trainable(phase.roles):
            reports = trainer.accumulate(phase)
        for role in phase.roles:
            held = trainer.roles[role].parameters
            grads = {n: p.grad.clone() for n, p in held.items() if p.grad is not None}
            for parameter in held.values():
                parameter.grad = None
            loss = sum(float(report["loss"]) for report in reports) / len(reports)
            yield f"{phase.name} {role}", loss, grads
            break  # of a phase's roles the others are discriminators


def gradients(
    config: Path, logdir: Path, words: tuple[str, ...], factors: Factors
) -> list[tuple[str, float, dict[str, Tensor]]]:
    """Of a run with adapters, whose factors are noted; or of whole networks that get `factors`."""
    with built(config, logdir, *words) as trainer:
        if factors:
            merge(trainer, factors)
        else:
            give_values(trainer)
            factors.update(deltas(trainer))
        return list(step_gradients(trainer))


def merge(trainer: Trainer, factors: Factors) -> None:
    """Add what adapters add to the weights of each role's own network."""
    for role, layers in factors.items():
        for layer, (a, b) in layers.items():
            trainer.roles[role].module.get_parameter(f"{layer}.weight").data += b @ a


I2V = ("generator.model=Wan2.1-I2V-Tiny", "data.path={root}/data/tiny/latents")
EVERY = [(name, ()) for name in CONFIGS if name != "dmd_fdistill"]
EVERY += [("dmd", I2V), ("diffusion", I2V)]


@pytest.mark.parametrize(("method", "more"), EVERY)
def test_gradients_of_adapters_are_those_of_whole_weights_projected(
    method: str, more: tuple[str, ...], configs: dict[str, Path], tiny_root: Path, tmp_path: Path
) -> None:
    """Three roles on one base against three networks into which their adapters are merged."""
    factors: Factors = {}
    words = tuple(word.format(root=tiny_root) for word in more)
    added = (*overrides(method), *words)
    found = gradients(configs[method], tmp_path / "adapters", added, factors)
    gc.collect()  # LMDB opens a folder once
    expected = gradients(configs[method], tmp_path / "merged", words, factors)
    assert [phase for phase, _, _ in found] == [phase for phase, _, _ in expected]
    for (phase, loss, ours), (_, merged_loss, whole) in zip(found, expected, strict=True):
        assert loss == pytest.approx(merged_loss, rel=RELATIVE), phase
        role = phase.split()[1]
        if role not in factors or not factors[role]:
            continue  # a discriminator
        projected = {}
        for layer, (a, b) in factors[role].items():
            gradient = whole[f"{layer}.weight"]
            projected[f"{layer}.adapters.{role}.a"] = b.T @ gradient
            projected[f"{layer}.adapters.{role}.b"] = gradient @ a.T
        projected |= {name: whole[name] for name in (WEIGHT, BIAS) if name in whole}
        assert ours.keys() == projected.keys()
        difference = sum((ours[n] - projected[n]).square().sum() for n in ours) ** 0.5
        size = sum(value.square().sum() for value in projected.values()) ** 0.5
        assert difference < GRADIENT * size, phase


# ---- runs


def fresh(configs: dict[str, Path], logdir: Path, method: str = "dmd", *words: str) -> Path:
    """A run of four steps that saves each."""
    return run(configs[method], logdir, *overrides(method), "save_every=1", *words)


def teacher_bits(trainer: Trainer) -> dict[str, Tensor]:
    """The weights that no role moves."""
    model = trainer.roles["generator"].module
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".adapters." not in n}


def test_roles_share_one_network_that_stays_as_it_is(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    with built(configs["dmd"], tmp_path, *BOTH, "steps=3") as trainer:
        networks = trainer.method.parts.networks
        assert len({id(network.model) for network in networks.values()}) == 1
        assert networks["generator"].names == ("generator",)
        assert networks["critic"].names == ("critic",)
        assert not isinstance(networks["teacher"], OnAdapters)
        before = teacher_bits(trainer)
        trainer.train()
        after = teacher_bits(trainer)
        assert all(torch.equal(before[name], after[name]) for name in before)
        for role, held in trainer.roles.items():
            assert all(f".adapters.{role}." in name for name in held.parameters)
            moved = [n for n, p in held.parameters.items() if n.endswith(".b") and p.any()]
            assert len(moved) == len(held.parameters) // 2


def test_a_checkpoint_holds_adapters_alone(configs: dict[str, Path], tmp_path: Path) -> None:
    fresh(configs, tmp_path, "dmd", "steps=2")
    state = read_state(step_folder(tmp_path, 2))
    assert state
    weights = [name for name in state if name.startswith(("roles.", "ema.", "optim."))]
    assert all(".adapters." in name or "param_groups" in name for name in weights)
    assert {name.split(".")[1] for name in weights} == {"generator", "critic"}


@pytest.mark.parametrize(
    "method",
    [
        "dmd_gan",
        "diffusion",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("dmd", "self_forcing_dmd")),
    ],
)
def test_a_resumed_run_ends_where_an_unbroken_one_does(
    method: str, configs: dict[str, Path], tmp_path: Path
) -> None:
    whole = fresh(configs, tmp_path / "whole", method)
    for step in (1, 2):
        broken = cut_after(whole, tmp_path / f"broken{step}", step)
        fresh(configs, broken, method)
        assert_same_end(whole, broken, 4)


def on_ranks(config: Path, logdir: Path, words: tuple[str, ...]) -> None:
    with distributed_session(timeout_s=60.0) as session:
        build(config, logdir, session, *words).train()


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_other_ranks(
    ranks: int, configs: dict[str, Path], tmp_path: Path
) -> None:
    """One rank, then several: as one rank all the way, to rounding."""
    whole = fresh(configs, tmp_path / "whole")
    moved = cut_after(whole, tmp_path / "moved", 1)
    run_on_ranks(ranks, on_ranks, configs["dmd"], moved, (*BOTH, "save_every=1"))
    left, right = (read_state(step_folder(logdir, 4)) for logdir in (whole, moved))
    assert left.keys() == right.keys()
    for name, value in left.items():
        if isinstance(value, Tensor) and name.startswith("roles."):
            torch.testing.assert_close(value, right[name], rtol=1e-4, atol=1e-5)


def test_another_base_is_refused_by_name(configs: dict[str, Path], tmp_path: Path) -> None:
    logdir = fresh(configs, tmp_path / "run", "dmd", "steps=1")
    weights = tmp_path / "other.safetensors"
    held = load_file(next((tiny_model(configs)).glob("*.safetensors")))
    write_weights({name: value + 0.01 for name, value in held.items()}, weights, {})
    words = [f"{role}.weights={weights}" for role in ("generator", "critic", "teacher")]
    with pytest.raises(ConfigError) as refused:
        fresh(configs, logdir, "dmd", *words)
    message = str(refused.value)
    assert f"generator.weights: is None, now {weights}" in message
    assert "generator: the weights that it begins with were exchanged" in message


def tiny_model(configs: dict[str, Path]) -> Path:
    config = load(configs["dmd"])
    return Path(config.model_root) / "Wan2.1-T2V-Tiny"


def test_an_adapter_goes_on_from_a_run_or_a_file(configs: dict[str, Path], tmp_path: Path) -> None:
    first = fresh(configs, tmp_path / "first")
    file = tmp_path / "exported.safetensors"
    trained = read_adapter(first, averaged=False)
    write_adapter(file, trained.factors, layout="diffusers")
    ends = [
        begun(configs["dmd"], tmp_path / name, f"generator.adapter.weights={begin}")
        for name, begin in (("run", first), ("file", file))
    ]
    expected = {"run": read_adapter(first).factors, "file": trained.factors}
    for found, wanted in zip(ends, expected.values(), strict=True):
        assert all(torch.equal(found[layer][1], wanted[layer].b) for layer in wanted)
    words = ("generator.adapter.rank=5", f"generator.adapter.weights={file}")
    assert "rank and targets must be those" in refusal(configs["dmd"], tmp_path / "x", *words)


def begun(config: Path, logdir: Path, word: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The generator's factors before the first step."""
    with built(config, logdir, *BOTH, word) as trainer:
        return deltas(trainer)["generator"]


def style(path: Path, configs: dict[str, Path]) -> dict[str, LowRank]:
    """An adapter file that changes the tiny model, and its factors."""
    weights = load_file(next(tiny_model(configs).glob("*.safetensors")))
    rng = torch.Generator().manual_seed(5)
    factors = {}
    for name, weight in weights.items():
        if name.endswith("attn.q.weight") or name.endswith("ffn.0.weight"):
            out, inside = weight.shape
            a, b = (0.5 * torch.randn(s, generator=rng) for s in ((2, inside), (out, 2)))
            factors[name.removesuffix(".weight")] = LowRank(a, b)
    write_adapter(path, factors, layout="comfyui")
    return factors


def test_a_style_stays_on_in_all_roles(configs: dict[str, Path], tmp_path: Path) -> None:
    """Losses are those of a base into which it is merged."""
    path = tmp_path / "style.safetensors"
    factors = style(path, configs)
    words = [f"{role}.adapters=['{path}:0.7']" for role in ("generator", "critic", "teacher")]
    found = losses(configs["dmd"], tmp_path / "added", *BOTH, *words)
    base = load_file(next(tiny_model(configs).glob("*.safetensors")))
    for layer, (a, b) in factors.items():
        base[f"{layer}.weight"] += 0.7 * b @ a
    write_weights(base, tmp_path / "merged.safetensors", {})
    words = [
        f"{r}.weights={tmp_path}/merged.safetensors" for r in ("generator", "critic", "teacher")
    ]
    expected = losses(configs["dmd"], tmp_path / "merged", *BOTH, *words)
    assert found == pytest.approx(expected, rel=1e-5)
    plain = losses(configs["dmd"], tmp_path / "plain", *BOTH)
    assert found != pytest.approx(plain, rel=1e-3)


def losses(config: Path, logdir: Path, *words: str) -> dict[str, float]:
    """Of the second step."""
    run(config, logdir, *words, "steps=2")
    return {key: value for key, value in rows(logdir)[-1].items() if key.endswith("/loss")}


def test_a_whole_student_shares_nothing_with_the_base_of_the_others(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    with built(configs["dmd"], tmp_path, BOTH[1], "steps=2") as trainer:
        networks = trainer.method.parts.networks
        assert networks["critic"].model is networks["teacher"].model
        assert networks["generator"].model is not networks["teacher"].model
        trainer.train()


def mixed(config: Path, logdir: Path, words: tuple[str, ...]) -> list[str]:
    """Dtypes of what is held, after two steps."""
    with distributed_session(timeout_s=60.0) as session:
        trainer = build(config, logdir, session, *words)
        trainer.train()
        model = trainer.roles["generator"].module
        return sorted({f"{p.dtype} {'.adapters.' in name}" for name, p in model.named_parameters()})


@pytest.mark.parametrize(
    "base",
    ["sharded", *(pytest.param(name, marks=pytest.mark.slow) for name in ("whole", "eight bits"))],
)
def test_bf16_bases_have_fp32_adapters_on_one_rank_and_on_two(
    base: str, configs: dict[str, Path], tmp_path: Path
) -> None:
    """The critic is frozen when the first pass comes, and right afterwards."""
    kinds = {"whole": ("teacher.sharded=false",), "eight bits": ("teacher.storage=fp8",)}
    words = (*BOTH, "mixed_precision=true", "steps=3", *kinds.get(base, ()))
    (alone,) = run_on_ranks(1, mixed, configs["dmd"], tmp_path / "1", words)
    both = run_on_ranks(2, mixed, configs["dmd"], tmp_path / "2", words)
    assert "torch.float32 True" in alone
    assert "torch.bfloat16 False" in alone
    assert both == [alone, alone]
    for one, two in zip(rows(tmp_path / "1"), rows(tmp_path / "2"), strict=True):
        kept = {k: v for k, v in one.items() if k.endswith(("/loss", "/grad_norm"))}
        assert {k: two[k] for k in kept} == pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("generator.adapter.rank=4", "generator.random_init=true"), "generator.random_init: an"),
        (("generator.storage=fp8",), "generator.storage: is for networks that stay as they are"),
        (("critic.adapters=[x]",), "critic.adapters: is for networks that stay as they are"),
        ((*BOTH, "loss.critic_pull=0.1"), "loss.critic_pull: 0.1 moves weights toward weights"),
        ((*BOTH, "generator.adapters=[nowhere.safetensors]"), "nowhere.safetensors"),
        (("generator.adapter.rnk=4",), "did you mean 'generator.adapter.rank'"),
    ],
)
def test_impossible_runs_are_refused(
    words: tuple[str, ...], message: str, configs: dict[str, Path], tmp_path: Path
) -> None:
    assert message in refusal(configs["dmd"], tmp_path, *words)


def test_alpha_says_how_fast_the_second_factor_learns(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    """With plain first updates of AdamW a factor b moves by its rate."""
    steps = {}
    for alpha in (3, 6):
        words = (*BOTH, f"generator.adapter.alpha={alpha}", "steps=1", "generator.betas=[0.0,0.9]")
        with built(configs["dmd"], tmp_path / str(alpha), *words) as trainer:
            trainer.train()
            steps[alpha] = {
                name: p.detach().clone()
                for name, p in trainer.roles["generator"].parameters.items()
                if name.endswith(".b")
            }
        gc.collect()
    for name, step in steps[3].items():
        torch.testing.assert_close(steps[6][name], 2.0 * step, rtol=1e-4, atol=1e-9)
