"""What one outer step does: who is evaluated how often, who moves, what is written."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from model.types import Denoiser
from tests.runs import build, built, rows, run
from trainer.base import Trainer
from trainer.build import RunOptions, build_trainer
from trainer.config import load
from trainer.diffusion import DiffusionTrainer
from trainer.distillation import ScoreDistillationTrainer
from trainer.phases import Phase
from trainer.stopping import Interrupted
from utils.distributed import distributed_session
from utils.seeding import generator

Weights = dict[str, Tensor]


@pytest.fixture
def dmd(configs: dict[str, Path], tmp_path: Path) -> Iterator[ScoreDistillationTrainer]:
    """A DMD trainer with batches of 4 that moves its generator at every second step."""
    with built(configs["dmd"], tmp_path / "run") as trainer:
        assert isinstance(trainer, ScoreDistillationTrainer)
        yield trainer


@pytest.fixture
def diffusion(configs: dict[str, Path], tmp_path: Path) -> Iterator[DiffusionTrainer]:
    """A diffusion trainer with batches of 4."""
    with built(configs["diffusion"], tmp_path / "run") as trainer:
        assert isinstance(trainer, DiffusionTrainer)
        yield trainer


@dataclass(frozen=True)
class Evaluation:
    """One call of a network."""

    role: str
    batch: int
    grad: bool  # whether autograd recorded it


def watched(networks: dict[str, Denoiser]) -> list[Evaluation]:
    """A list that fills with the calls of these networks."""
    calls: list[Evaluation] = []

    def watch(role: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            calls.append(Evaluation(role, len(inputs[0]), output.x0.requires_grad))

        return hook

    for role, network in networks.items():
        assert isinstance(network, nn.Module)
        network.register_forward_hook(watch(role))
    return calls


def watched_dmd(trainer: ScoreDistillationTrainer) -> list[Evaluation]:
    method = trainer.method
    return watched(
        {"generator": method.generator, "critic": method.critic, "teacher": method.teacher}
    )


def exit_step(phase: str, step: int) -> int:
    """The exit that all ranks draw at `step`, from the key that names it."""
    return int(torch.randint(4, (), generator=generator(0, phase, "shared", step)))


def one_phase(trainer: Trainer, role: str, step: int) -> None:
    """Run only the phase of `role` as at `step`."""
    trainer.state.step = step
    (phase,) = [phase for phase in trainer.phases(0) if phase.name == role]
    trainer.optimise(phase)


@pytest.mark.parametrize("step", [0, 2, 4, 6])
def test_a_generator_step_calls_generator_to_its_exit_critic_once_and_teacher_once_for_both_halves(
    dmd: ScoreDistillationTrainer, step: int
) -> None:
    calls = watched_dmd(dmd)
    one_phase(dmd, "generator", step)
    assert calls == [
        *[Evaluation("generator", 4, grad=False)] * exit_step("generator", step),
        Evaluation("generator", 4, grad=True),
        Evaluation("critic", 4, grad=False),
        Evaluation("teacher", 8, grad=False),
    ]


def test_the_steps_above_cover_several_exits() -> None:
    assert len({exit_step("generator", step) for step in (0, 2, 4, 6)}) >= 3


def test_without_guidance_the_teacher_sees_one_batch(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    with built(configs["dmd"], tmp_path, "loss.cfg_scale=1.0") as trainer:
        assert isinstance(trainer, ScoreDistillationTrainer)
        calls = watched_dmd(trainer)
        one_phase(trainer, "generator", 0)
    assert calls[-1] == Evaluation("teacher", 4, grad=False)


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_a_critic_step_calls_generator_to_its_exit_without_gradient_and_critic_once(
    dmd: ScoreDistillationTrainer, step: int
) -> None:
    calls = watched_dmd(dmd)
    one_phase(dmd, "critic", step)
    assert calls == [
        *[Evaluation("generator", 4, grad=False)] * (exit_step("critic", step) + 1),
        Evaluation("critic", 4, grad=True),
    ]


def test_a_diffusion_step_calls_the_generator_once(diffusion: DiffusionTrainer) -> None:
    calls = watched({"generator": diffusion.method.generator})
    one_phase(diffusion, "generator", 0)
    assert calls == [Evaluation("generator", 4, grad=True)]


def test_micro_batches_multiply_calls_and_divide_batches(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    with built(configs["diffusion"], tmp_path, "accumulation=2") as trainer:
        assert isinstance(trainer, DiffusionTrainer)
        calls = watched({"generator": trainer.method.generator})
        one_phase(trainer, "generator", 0)
    assert calls == [Evaluation("generator", 2, grad=True)] * 2


def weights_of(network: Denoiser) -> Weights:
    assert isinstance(network, nn.Module)
    return {name: p.detach().clone() for name, p in network.named_parameters()}


# Methods with several trained roles, and what lets all of them move at the first step.
AT_ONCE: dict[str, tuple[str, ...]] = {
    "dmd": (),
    "dmd_gan": (),
    "dmd_fdistill": ("loss.critic_pull=0.0",),  # or the generator's phase moves the critic too
    "sid": (),
    "causvid": (),
    "self_forcing_sid": (),
    "gan": ("loss.discriminator_warmup_steps=0",),
    "gan_teacher": (),
}


def moved(before: Weights, network: Denoiser) -> bool:
    """Whether any weight changed."""
    after = weights_of(network)
    return any(not torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(("role", "other"), [("generator", "critic"), ("critic", "generator")])
def test_a_phase_moves_its_own_role_alone(
    dmd: ScoreDistillationTrainer, role: str, other: str
) -> None:
    networks = {name: getattr(dmd.method, name) for name in ("generator", "critic", "teacher")}
    before = {name: weights_of(network) for name, network in networks.items()}
    one_phase(dmd, role, 0)
    changed = {name for name, network in networks.items() if moved(before[name], network)}
    assert changed == {role}
    assert dmd.state.updates == {role: 1, other: 0}


def test_the_teacher_never_gets_a_gradient(dmd: ScoreDistillationTrainer) -> None:
    teacher = dmd.method.teacher
    assert isinstance(teacher, nn.Module)
    dmd.train()
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(
    ("every", "generator_steps"), [(1, [1, 2, 3, 4, 5]), (2, [1, 3, 5]), (3, [1, 4])]
)
def test_the_generator_moves_at_the_first_and_then_every_nth_step_and_the_critic_always(
    every: int, generator_steps: list[int], configs: dict[str, Path], tmp_path: Path
) -> None:
    overrides = (f"loss.generator_every={every}", "steps=5", "batch_size=1")
    with built(configs["dmd"], tmp_path, *overrides) as trainer:
        trainer.train()
        assert trainer.state.updates == {
            "generator": trainer.total_updates("generator"),
            "critic": trainer.total_updates("critic"),
        }
    found = rows(tmp_path)
    assert [row["step"] for row in found if "generator/loss" in row] == generator_steps
    assert [row["step"] for row in found if "critic/loss" in row] == [1, 2, 3, 4, 5]


def test_the_generator_is_optimised_before_the_critic(dmd: ScoreDistillationTrainer) -> None:
    assert [phase.roles for phase in dmd.phases(0)] == [("generator",), ("critic",)]
    assert [phase.roles for phase in dmd.phases(1)] == [("critic",)]


@pytest.mark.parametrize(
    ("method", "opponents"),
    [
        ("dmd_gan", ("critic", "discriminator")),
        ("gan", ("critic", "discriminator")),
        ("gan_teacher", ("discriminator",)),
    ],
)
def test_critic_and_discriminator_move_together_after_the_generator(
    method: str, opponents: tuple[str, ...], configs: dict[str, Path], tmp_path: Path
) -> None:
    with built(configs[method], tmp_path, *AT_ONCE[method]) as trainer:
        assert [phase.roles for phase in trainer.phases(0)] == [("generator",), opponents]


@pytest.mark.parametrize(
    ("warmup", "every", "generator_steps"), [(0, 1, [1, 2, 3, 4]), (2, 1, [3, 4]), (1, 2, [2, 4])]
)
def test_the_discriminator_moves_alone_until_its_warm_up_ends(
    warmup: int,
    every: int,
    generator_steps: list[int],
    configs: dict[str, Path],
    tmp_path: Path,
) -> None:
    overrides = (f"loss.discriminator_warmup_steps={warmup}", f"loss.generator_every={every}")
    with built(configs["gan"], tmp_path, *overrides, "steps=4", "batch_size=1") as trainer:
        trainer.train()
        expected = {role: trainer.total_updates(role) for role in trainer.roles}
        assert trainer.state.updates == expected
    found = rows(tmp_path)
    assert [row["step"] for row in found if "generator/loss" in row] == generator_steps
    assert [row["step"] for row in found if "critic/loss" in row] == [1, 2, 3, 4]


@pytest.mark.parametrize("method", AT_ONCE)
def test_a_phase_leaves_no_gradient_in_other_roles_and_does_not_move_them(
    method: str, configs: dict[str, Path], tmp_path: Path
) -> None:
    """Losses of SiD and of discriminators reach the generator through other roles' networks."""
    with built(configs[method], tmp_path, *AT_ONCE[method], "batch_size=2") as trainer:
        for _ in range(2):  # the first time no role has been moved before
            for phase in trainer.phases(0):
                before = {name: weights_of(role.network) for name, role in trainer.roles.items()}
                trainer.optimise(phase)
                now = {name: role.network for name, role in trainer.roles.items()}
                assert {name for name in now if moved(before[name], now[name])} == set(phase.roles)
                weights = [p for network in now.values() for p in network.parameters()]
                assert all(p.grad is None and p.requires_grad for p in weights)


def test_the_critic_is_pulled_after_the_generator_and_not_after_itself(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    """The config's critic_pull is 0.1."""
    with built(configs["dmd_fdistill"], tmp_path, "batch_size=2") as trainer:
        critic, generator_ = (trainer.roles[name].network for name in ("critic", "generator"))
        before = weights_of(critic)
        one_phase(trainer, "generator", 0)
        after = weights_of(generator_)
        pulled = weights_of(critic)
        assert all(torch.equal(pulled[n], before[n].lerp(after[n], 0.1)) for n in before)
        with patch.object(trainer, "apply_gradients", lambda _: None):
            one_phase(trainer, "critic", 0)
        assert not moved(pulled, critic)


def test_the_average_equals_the_weights_before_its_start_and_lags_from_it_on(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    """The config's average has decay 0.5 and starts at outer step 2."""
    with built(configs["diffusion"], tmp_path) as trainer:
        (phase,) = trainer.phases(0)
        network = trainer.roles["generator"].network
        for step in range(2):
            take(trainer, phase, step)
            after = weights_of(network.model)
            assert all(torch.equal(trainer.ema.shadow[name], after[name]) for name in after)
        expected = after
        for step in range(2, 4):
            take(trainer, phase, step)
            now = weights_of(network.model)
            expected = {name: torch.lerp(expected[name], now[name], 0.5) for name in now}
            assert all(torch.equal(trainer.ema.shadow[name], expected[name]) for name in now)


def test_the_critic_does_not_move_the_average(dmd: ScoreDistillationTrainer) -> None:
    one_phase(dmd, "generator", 1)  # before the average's start: equal
    one_phase(dmd, "critic", 2)
    weights = weights_of(dmd.roles["generator"].network.model)
    assert all(torch.equal(dmd.ema.shadow[name], weights[name]) for name in weights)
    one_phase(dmd, "generator", 2)  # one step of decay 0.5 from there
    after = weights_of(dmd.roles["generator"].network.model)
    expected = {name: torch.lerp(weights[name], after[name], 0.5) for name in after}
    one_phase(dmd, "critic", 3)
    assert all(torch.equal(dmd.ema.shadow[name], expected[name]) for name in after)


def take(trainer: Trainer, phase: Phase, step: int) -> None:
    trainer.state.step = step
    trainer.optimise(phase)


def test_no_save_writes_no_checkpoint(configs: dict[str, Path], tmp_path: Path) -> None:
    config = load(configs["diffusion"], ["save_every=1", "steps=2"])
    with distributed_session() as session:
        build_trainer(config, session, RunOptions(tmp_path, "d", save=False, wandb=False)).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.yaml",
        "fingerprint.json",
        "history.jsonl",
        "metrics.jsonl",
        "report.html",
    ]
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_an_interrupted_run_without_checkpoints_promises_no_continuation(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    config = load(configs["diffusion"], ["steps=5"])
    with distributed_session() as session:
        options = RunOptions(tmp_path, "d", save=False, wandb=False)
        trainer = build_trainer(config, session, options)
        stop = patch.object(
            trainer.ema, "update", lambda *_, **__: signal.raise_signal(signal.SIGTERM)
        )
        with stop, pytest.raises(Interrupted, match=r"^stopped after step 1; nothing is saved"):
            trainer.train()


def test_checkpoints_lie_at_the_interval_and_at_the_end_and_the_newest_are_kept(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    run(configs["diffusion"], tmp_path, "steps=5", "save_every=2", "keep_checkpoints=2")
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert saved == ["latest", "step_000004", "step_000005"]
    assert (tmp_path / "checkpoints" / "latest").read_text(encoding="utf-8") == "step_000005\n"


VALIDATION = ("steps=5", "batch_size=1", "validation.every=2", "validation.count=3")


@pytest.mark.parametrize("method", ["dmd", "diffusion", "self_forcing_dmd", "causal_diffusion"])
def test_pictures_are_made_at_their_interval_and_at_the_end(
    method: str, configs: dict[str, Path], tmp_path: Path
) -> None:
    run(configs[method], tmp_path, *VALIDATION)
    pictures = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in pictures] == [
        "step_000002.png",
        "step_000004.png",
        "step_000005.png",
    ]
    with Image.open(pictures[0]) as first, Image.open(pictures[-1]) as last:
        assert first.size == last.size
        assert first.tobytes() != last.tobytes()


def test_pictures_change_neither_weights_nor_metrics(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    run(configs["dmd"], tmp_path / "with", *VALIDATION)
    run(configs["dmd"], tmp_path / "without", *VALIDATION, "validation.every=0")
    assert rows(tmp_path / "with") == rows(tmp_path / "without")


def test_no_visualize_makes_no_picture(configs: dict[str, Path], tmp_path: Path) -> None:
    config = load(configs["dmd"], VALIDATION)
    options = RunOptions(tmp_path, "dmd", visualize=False, wandb=False)
    with distributed_session() as session:
        build_trainer(config, session, options).train()
    assert not (tmp_path / "samples").exists()


def test_pictures_are_made_with_averaged_weights_which_then_leave(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    """With a decay near 1 from step 0 the average stays at the start, and so must the picture."""
    frozen = ("ema.start_step=0", "ema.decay=0.9999999", "generator.lr=0.1")
    with built(configs["dmd"], tmp_path, *VALIDATION, *frozen) as trainer:
        network = trainer.roles["generator"].network
        start = weights_of(network.model)
        seen: list[Weights] = []
        validator = trainer.parts.validator
        assert validator is not None
        network.register_forward_hook(lambda *_: seen.append(weights_of(network.model)))
        one_phase(trainer, "generator", 0)
        trained = weights_of(network.model)
        seen.clear()
        trainer.show_samples(validator)
        assert len(seen) == 4
        assert all(torch.allclose(seen[0][n], start[n], rtol=0, atol=1e-6) for n in start)
        assert moved(start, network.model)
        assert not moved(trained, network.model)


def test_two_trainings_in_one_process_do_not_touch_each_other(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    alone = rows(run(configs["dmd"], tmp_path / "alone", "steps=2"))
    with distributed_session() as session:
        first = build(configs["dmd"], tmp_path / "first", session, "steps=2")
        second = build(configs["dmd"], tmp_path / "second", session, "steps=2", "seed=1")
        second.train()
        first.train()
    assert rows(tmp_path / "first") == alone


@pytest.mark.parametrize(
    ("method", "precision"),
    [
        *((name, "mixed_precision=false") for name in ("dmd", "gan", "self_forcing_dmd")),
        *((name, "mixed_precision=true") for name in ("gan", "self_forcing_sid")),  # through FSDP2
    ],
)
def test_recomputing_blocks_changes_no_number(
    configs: dict[str, Path], tmp_path: Path, method: str, precision: str
) -> None:
    causal = ("causal.kv_gradient=straight_through",) if "forcing" in method else ()
    settings = ("steps=2", "batch_size=2", precision, *causal)
    run(configs[method], tmp_path / "kept", *settings)
    recompute = "parallel.activation_checkpoint=block"
    run(configs[method], tmp_path / "recomputed", *settings, recompute)
    assert rows(tmp_path / "recomputed") == rows(tmp_path / "kept")


def test_saving_and_showing_samples_are_no_time_of_steps(
    configs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hour, real, spent = 3600.0, time.perf_counter, [0.0]
    monkeypatch.setattr("utils.metrics.time.perf_counter", lambda: real() + spent[0])

    def slow(self: Trainer, *args: Any) -> None:
        spent[0] += hour

    for name in ("save", "show_samples"):
        monkeypatch.setattr(Trainer, name, slow)
    run(configs["dmd"], tmp_path, "steps=3", "save_every=1", "validation.every=1")
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert spent[0] == 6 * hour
    assert all(json.loads(line)["seconds_per_step"] < hour for line in lines)
