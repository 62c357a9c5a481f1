"""A resumed run ends where the unbroken run ends, bit for bit, on any number of ranks."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.ranks import run_on_ranks
from tests.runs import (
    CONFIGS,
    MUON,
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
from trainer.base import Trainer
from utils import checkpoint
from utils.config import ConfigError
from utils.distributed import distributed_session

STEPS = 5
# Case -> method, overrides. Between them: both optimizers, both schedules.
CASES = {
    "dmd-muon": ("dmd", MUON["dmd"]),
    "dmd-adamw": ("dmd", ("loss.generator_every=3",)),
    "diffusion-muon": ("diffusion", MUON["diffusion"]),
}
SAVE_ALL = (f"steps={STEPS}", "save_every=1")
SAVE_LAST = (f"steps={STEPS}", "save_every=100")  # a run may go on with another interval


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of this file's runs."""
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def straight(base: Path, configs: dict[str, Path]) -> Path:
    """Each case from start to end without a break, every step saved, and where."""
    for case, (method, overrides) in CASES.items():
        run(configs[method], base / "straight" / case, *SAVE_ALL, *overrides)
    return base / "straight"


@pytest.mark.parametrize(
    ("case", "stop"),
    [
        ("dmd-muon", 1), ("dmd-muon", 2), ("dmd-muon", 3), ("dmd-muon", 4),
        ("dmd-adamw", 2), ("dmd-adamw", 3), ("diffusion-muon", 1), ("diffusion-muon", 3),
    ],
)  # fmt: skip
def test_a_resumed_run_ends_bit_for_bit_as_the_unbroken_one(
    case: str, stop: int, straight: Path, configs: dict[str, Path], tmp_path: Path
) -> None:
    method, overrides = CASES[case]
    resumed = cut_after(straight / case, tmp_path / "run", stop)
    run(configs[method], resumed, *SAVE_LAST, *overrides)
    assert_same_end(resumed, straight / case, STEPS)


FEW = ("steps=3", "batch_size=2")
LONGER = "causal.rollout_frames=9"
# Every other pair of trainer and method, and what changes a causal rollout: case -> the step after
# which it is broken off, method, overrides. At that step the generator is next to move.
BROKEN = {
    "dmd_gan": (2, "dmd_gan", ()),
    "dmd_fdistill": (2, "dmd_fdistill", ()),
    "projected": (1, "dmd", ("loss.project=true", "loss.walk=euler", "loss.generator_every=1")),
    "sid": (2, "sid", ()),
    "causvid": (2, "causvid", ()),
    "gan": (1, "gan", ()),
    "gan-again": (2, "gan", ("loss.generator_every=1",)),
    "gan_teacher": (2, "gan_teacher", ()),
    "ode": (1, "ode", ()),
    "consistency": (1, "consistency", ()),
    "pdd": (1, "pdd", ()),
    "pdd-adapter": (1, "pdd", ("generator.adapter.rank=2",)),
    "teacher-forcing": (1, "causal_diffusion", ()),
    "diffusion-forcing": (
        1,
        "causal_diffusion",
        ("loss.teacher_forcing=false", "loss.clean_noise=0"),
    ),
    "self_forcing_dmd": (2, "self_forcing_dmd", ()),
    "self_forcing_sid": (2, "self_forcing_sid", ()),
    "straight-through": (2, "self_forcing_dmd", ("causal.kv_gradient=straight_through",)),
    "replayed": (2, "self_forcing_dmd", ("causal.kv_gradient=replayed",)),
    "self-gradient": (2, "self_forcing_dmd", ("causal.kv_gradient=parallel",)),
    "exits-apart": (2, "self_forcing_dmd", ("causal.same_step_across_blocks=false",)),
    "steps-of-the-first-block": (
        2,
        "self_forcing_dmd",
        ("denoising_step_list=[1000,500]", "first_block_step_list=[1000,750,500,250]"),
    ),
    "last-step-remembered": (2, "self_forcing_dmd", ("causal.remember=last_step",)),
    "given-first-frame": (2, "self_forcing_dmd", ("causal.given_first_frame=true",)),
    "longer-rollouts": (2, "self_forcing_dmd", (LONGER, "causal.local_attn_size=4")),
}


# What a method's other cases show already: no rollout keeps anything from step to step.
ONCE_MORE = (
    "replayed", "last-step-remembered", "gan-again", "straight-through", "exits-apart",
    "dmd_fdistill", "sid", "gan", "longer-rollouts",
)  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow if case in ONCE_MORE else ()) for case in BROKEN],
)
def test_a_run_of_any_method_resumes_bit_for_bit(
    case: str, configs: dict[str, Path], tiny_root: Path, tmp_path: Path
) -> None:
    stop, method, overrides = BROKEN[case]
    if case == "given-first-frame":
        overrides = (*overrides, f"data.path={tiny_root / 'data' / 'tiny' / 'latents'}")
    settings = (*FEW, f"save_every={stop}", *overrides)
    whole = run(configs[method], tmp_path / "whole", *settings)
    resumed = cut_after(whole, tmp_path / "resumed", stop)
    run(configs[method], resumed, *settings)
    assert_same_end(resumed, whole, 3)


def test_saving_changes_nothing_while_the_generator_still_waits_for_its_first_update(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    settings = ("steps=3", "batch_size=2")  # the generator waits for one step
    often = run(configs["gan"], tmp_path / "often", *settings, "save_every=1")
    once = run(configs["gan"], tmp_path / "once", *settings)
    assert_same_end(often, once, 3)


def test_every_kind_of_run_is_broken_off_and_resumed() -> None:
    resumed = {method for _, method, _ in BROKEN.values()} | {name for name, _ in CASES.values()}
    assert resumed == set(CONFIGS)


def test_a_checkpoint_holds_all_that_moves(straight: Path) -> None:
    state = read_state(step_folder(straight / "dmd-muon", STEPS))
    weight = "blocks.0.self_attn.q.weight"
    bias = "blocks.0.self_attn.q.bias"
    assert {
        f"roles.generator.{weight}", f"roles.critic.{weight}", f"ema.generator.{weight}",
        f"optim.generator.state.{weight}.momentum_buffer",
        f"optim.critic.state.{weight}.momentum_buffer",
        f"optim.generator.state.{bias}.exp_avg", f"optim.generator.state.{bias}.exp_avg_sq",
        f"optim.generator.state.{bias}.step", f"optim.critic.state.{bias}.exp_avg",
    } <= state.keys()  # fmt: skip
    counters = {key: int(value) for key, value in state.items() if key.startswith("state.")}
    assert counters == {
        "state.step": 5,
        "state.draws": 4 * (5 + 3),  # batches of 4: five of the critic, three of the generator
        "state.updates.critic": 5,
        "state.updates.generator": 3,
    }
    assert not any("teacher" in key for key in state)


def test_metrics_rows_are_the_same_when_saves_fall_between_logs(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    settings = ("steps=6", "log_every=2", "save_every=3")
    whole = run(configs["diffusion"], tmp_path / "whole", *settings)
    assert [row["step"] for row in rows(whole)] == [2, 3, 4, 6]
    resumed = cut_after(whole, tmp_path / "resumed", 3)
    run(configs["diffusion"], resumed, *settings)
    assert_same_end(resumed, whole, 6)


def test_a_second_start_of_a_finished_run_changes_no_checkpoint_and_no_metric(
    straight: Path, configs: dict[str, Path], tmp_path: Path
) -> None:
    logdir = shutil.copytree(straight / "dmd-muon", tmp_path / "run")

    def files() -> dict[Path, tuple[int, bytes]]:
        found = [*(logdir / "checkpoints").rglob("*"), logdir / "metrics.jsonl"]
        return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in found if p.is_file()}

    before = files()
    with built(configs["dmd"], logdir, *SAVE_ALL, *MUON["dmd"]) as trainer:
        for role in trainer.roles.values():
            role.network.register_forward_hook(lambda *_: pytest.fail("a network was evaluated"))
        trainer.train()
    after = files()
    assert {path: content for path, (_, content) in after.items()} == {
        path: content for path, (_, content) in before.items()
    }
    saved = [path for path in before if path.name != "metrics.jsonl"]
    assert [after[path][0] for path in saved] == [before[path][0] for path in saved]


# ---- another number of ranks

Weights = dict[str, torch.Tensor]
REPLICATED = "sharding_strategy=hybrid_full"


@dataclass(frozen=True)
class TwoRanks:
    """What two ranks did: a run of their own, and two that one process had begun."""

    logdir: Path
    weights: Weights  # of all roles after step 2, gathered without a checkpoint
    continued: Path
    replicated: Path  # continued with a whole copy on each rank


def train_on_two_ranks(path: Path, logdir: Path, continued: Path, replicated: Path) -> Weights:
    """On each rank: train from the start, and from the checkpoints of one process."""
    weights: Weights = {}
    muon = MUON["dmd"]
    with distributed_session(timeout_s=60.0) as session:
        own = build(path, logdir, session, f"steps={STEPS}", "save_every=2", *muon)
        gather_at(own, 2, weights).train()
        del own
        build(path, continued, session, *SAVE_LAST, *muon).train()
        build(path, replicated, session, *SAVE_LAST, *muon, REPLICATED).train()
    return weights


def gather_at(trainer: Trainer, step: int, weights: Weights) -> Trainer:
    """Fill `weights` with all whole weights when `step` is saved. Collective."""
    save = trainer.save

    def gather_and_save() -> None:
        if trainer.state.step == step:
            weights.update(gathered(trainer))
        save()

    trainer.save = gather_and_save  # type: ignore[method-assign]
    return trainer


def gathered(trainer: Trainer) -> Weights:
    """The whole weights of all trained roles, by role and name."""
    return {
        f"{role}.{name}": (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for role, trained in trainer.roles.items()
        for name, p in trained.network.model.named_parameters()
    }


@pytest.fixture(scope="module")
def two_ranks(base: Path, straight: Path, configs: dict[str, Path]) -> TwoRanks:
    """All that needs two ranks; one spawn. Each is a node of its own."""
    begun = [
        cut_after(straight / "dmd-muon", base / name, 2) for name in ("continued", "replicated")
    ]
    logdir = base / "two_ranks"
    results = run_on_ranks(2, train_on_two_ranks, configs["dmd"], logdir, *begun, local_world=1)
    return TwoRanks(logdir, results[0], *begun)


def assert_close_metrics(run_: Path, reference: Path) -> None:
    for row, expected in zip(rows(run_), rows(reference), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


def test_one_process_loads_what_two_ranks_saved_bit_for_bit_and_goes_on_alike(
    two_ranks: TwoRanks, configs: dict[str, Path], tmp_path: Path
) -> None:
    resumed = cut_after(two_ranks.logdir, tmp_path / "run", 2)
    with built(configs["dmd"], resumed, *SAVE_LAST, *MUON["dmd"]) as trainer:
        trainer.resume()
        assert unequal(gathered(trainer), two_ranks.weights) == []
        saved = read_state(step_folder(two_ranks.logdir, 2))
        assert unequal(read_again(trainer, tmp_path), saved) == []
        trainer.train()
    assert_close_metrics(resumed, two_ranks.logdir)


def read_again(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """The whole state of a trainer, by way of a checkpoint of its own."""
    path = checkpoint.save(folder / "again", 1, trainer.state_dict(), {}, trainer.session)
    return read_state(path)


def test_two_shards_go_on_from_the_checkpoint_of_one_process(
    two_ranks: TwoRanks, straight: Path
) -> None:
    assert_close_metrics(two_ranks.continued, straight / "dmd-muon")


def test_two_replicas_go_on_from_the_checkpoint_of_one_process_and_save_one_that_it_loads(
    two_ranks: TwoRanks, straight: Path, configs: dict[str, Path], tmp_path: Path
) -> None:
    assert_close_metrics(two_ranks.replicated, straight / "dmd-muon")
    saved = read_state(step_folder(two_ranks.replicated, STEPS))
    with built(configs["dmd"], two_ranks.replicated, *SAVE_LAST, *MUON["dmd"]) as trainer:
        trainer.resume()
        assert unequal(read_again(trainer, tmp_path), saved) == []


# ---- another run


def test_the_log_directory_of_another_run_is_refused_with_the_keys_that_differ(
    straight: Path, configs: dict[str, Path]
) -> None:
    logdir = straight / "dmd-muon"
    before = (logdir / "config.yaml").read_bytes()
    with (
        pytest.raises(ConfigError) as caught,
        built(configs["dmd"], logdir, *MUON["dmd"], "seed=7", "critic.weight_decay=0.5", "steps=9"),
    ):
        pytest.fail("another run's directory was accepted")
    assert str(caught.value) == (
        f"{logdir}: holds another run; use a new --logdir, restore what has changed, or continue "
        "all the same with --allow_config_change: critic.weight_decay: is 0.01, now 0.5; seed: is "
        "0, now 7"
    )
    assert (logdir / "config.yaml").read_bytes() == before


def test_a_run_goes_on_with_more_steps_and_another_save_interval(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    constant = "generator.schedule=constant"  # a decaying schedule depends on the last step
    run(configs["diffusion"], tmp_path / "run", constant, "steps=2")
    run(configs["diffusion"], tmp_path / "run", constant, "steps=5", "save_every=2")
    run(configs["diffusion"], tmp_path / "whole", constant, "steps=5")
    assert_same_end(tmp_path / "run", tmp_path / "whole", 5)
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert saved == ["step_000002", "step_000004", "step_000005"]
