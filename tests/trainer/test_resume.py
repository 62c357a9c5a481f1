"""A run that stops, for whatever reason, ends where the unbroken run ends: bit for bit."""

from __future__ import annotations

import gc
import logging
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

import train
from tests.ranks import RankFailedError, run_on_ranks
from tests.runs import (
    MUON,
    build,
    built,
    cut_after,
    read_state,
    rows,
    run,
    step_folder,
    unequal,
    write_config,
)
from trainer.base import Phase, RunFailedError, Trainer
from utils import checkpoint
from utils.config import ConfigError
from utils.distributed import distributed_session

STEPS = 5
# Case -> method, overrides. Between them: both methods, both optimizers, both schedules.
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
def configs(base: Path, tiny_root: Path) -> dict[str, Path]:
    """The config file of each method."""
    return {name: write_config(base, tiny_root, name) for name in ("dmd", "diffusion")}


@pytest.fixture(scope="module")
def straight(base: Path, configs: dict[str, Path]) -> Path:
    """Each case from start to end without a break, every step saved, and where."""
    for case, (method, overrides) in CASES.items():
        run(configs[method], base / "straight" / case, *SAVE_ALL, *overrides)
    return base / "straight"


def assert_same_end(run_: Path, reference: Path, step: int = STEPS) -> None:
    """The last checkpoints are equal in every bit, and so are all metrics."""
    last = read_state(step_folder(run_, step))
    assert unequal(last, read_state(step_folder(reference, step))) == []
    assert rows(run_) == rows(reference)


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
    assert_same_end(resumed, straight / case)


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
    assert_same_end(resumed, whole, step=6)


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_two_shards_go_on_from_the_checkpoint_of_one_process(
    two_ranks: TwoRanks, straight: Path
) -> None:
    assert_close_metrics(two_ranks.continued, straight / "dmd-muon")


@pytest.mark.slow
def test_two_replicas_go_on_from_the_checkpoint_of_one_process_and_save_one_that_it_loads(
    two_ranks: TwoRanks, straight: Path, configs: dict[str, Path], tmp_path: Path
) -> None:
    assert_close_metrics(two_ranks.replicated, straight / "dmd-muon")
    saved = read_state(step_folder(two_ranks.replicated, STEPS))
    with built(configs["dmd"], two_ranks.replicated, *SAVE_LAST, *MUON["dmd"]) as trainer:
        trainer.resume()
        assert unequal(read_again(trainer, tmp_path), saved) == []


# ---- killed while saving


class FileOperations:
    """Calls `action(event, path)` before each change of a file below a folder, by audit hook.

    Audit hooks cannot be removed, so this is for processes of their own.
    """

    EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.active = False
        sys.addaudithook(self._audit)

    def action(self, event: str, path: str) -> None:
        raise NotImplementedError

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active or event not in self.EVENTS or threading.current_thread().daemon:
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        path = str(arguments[1] if event == "os.rename" else arguments[0])
        if not path.startswith("/"):  # shutil.rmtree names files relative to an open folder
            path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[-1]}"), path)
        if path.startswith(self.folder):
            self.active = False
            self.action(event, path)
            self.active = True


class Snapshots(FileOperations):
    """Copies the folder before each change: what a kill at that moment would leave."""

    def __init__(self, folder: Path, target: Path) -> None:
        super().__init__(folder)
        self.target = target
        self.taken: list[str] = []

    def action(self, event: str, path: str) -> None:
        shutil.copytree(self.folder, self.target / f"{len(self.taken):03d}")
        self.taken.append(f"{event} {path.removeprefix(self.folder)}")


class Killer(FileOperations):
    """Kills its own process, as kill -9 does, just before one change."""

    def __init__(self, folder: Path, event: str, ending: str) -> None:
        super().__init__(folder)
        self.event, self.ending = event, ending

    def action(self, event: str, path: str) -> None:
        if (event, path.endswith(self.ending)) == (self.event, True):
            os.kill(os.getpid(), signal.SIGKILL)


KEEP_ONE = ("steps=3", "save_every=1", "keep_checkpoints=1")
KEPT = ("steps=3", "save_every=1", "keep_checkpoints=9")


def watch_save(trainer: Trainer, watcher: FileOperations, step: int) -> None:
    """Activate `watcher` for the length of the save of `step`."""
    save = trainer.save

    def watched() -> None:
        watcher.active = trainer.state.step == step
        save()
        watcher.active = False

    trainer.save = watched  # type: ignore[method-assign]


def train_with_snapshots(path: Path, logdir: Path, target: Path) -> list[str]:
    with built(path, logdir, *KEEP_ONE) as trainer:
        watcher = Snapshots(logdir / "checkpoints", target)
        watch_save(trainer, watcher, step=2)
        trainer.train()
    return watcher.taken


def train_until_killed(path: Path, logdir: Path, event: str, ending: str) -> None:
    with built(path, logdir, *KEEP_ONE) as trainer:
        watch_save(trainer, Killer(logdir / "checkpoints", event, ending), step=2)
        trainer.train()


@pytest.fixture(scope="module")
def kept(base: Path, configs: dict[str, Path]) -> Path:
    """A short DMD run that keeps all its checkpoints, unkilled."""
    return run(configs["dmd"], base / "kept", *KEPT)


def test_before_and_after_each_file_operation_of_a_save_a_whole_checkpoint_is_found(
    kept: Path, configs: dict[str, Path], tmp_path: Path
) -> None:
    operations = run_on_ranks(
        1, train_with_snapshots, configs["dmd"], tmp_path / "run", tmp_path / "snapshots"
    )[0]
    assert len(operations) > 10, operations
    saved = {step: read_state(step_folder(kept, step)) for step in (1, 2)}
    found, proven = [], set()
    for number, operation in enumerate(operations):
        path = checkpoint.latest(tmp_path / "snapshots" / f"{number:03d}")
        assert path is not None, f"nothing to resume from before {operation}"
        found.append(checkpoint.step_of(path))
        content = b"".join(file.read_bytes() for file in sorted(path.iterdir()))
        if content not in proven:
            assert unequal(read_state(path), saved[found[-1]]) == [], f"torn before {operation}"
            proven.add(content)
    assert found == sorted(found), dict(zip(operations, found, strict=True))
    assert set(found) == {1, 2}


@pytest.mark.parametrize(
    ("event", "ending"),
    [
        ("os.mkdir", "step_000002.tmp"),
        ("open", ".distcp"),
        ("open", ".part.json"),
        ("os.rename", "step_000002"),
        ("os.rename", "latest"),
        ("os.rmdir", "step_000001.tmp"),
    ],
)
def test_a_run_killed_within_a_save_resumes_and_ends_as_the_unkilled_run(
    event: str, ending: str, kept: Path, configs: dict[str, Path], tmp_path: Path
) -> None:
    logdir = tmp_path / "run"
    with pytest.raises(RankFailedError) as caught:
        run_on_ranks(1, train_until_killed, configs["dmd"], logdir, event, ending)
    assert caught.value.exitcode == -signal.SIGKILL, caught.value
    run(configs["dmd"], logdir, "steps=3", "keep_checkpoints=1")
    assert_same_end(logdir, kept, step=3)
    assert sorted(path.name for path in (logdir / "checkpoints").iterdir()) == [
        "latest",
        "step_000003",
    ]


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_is_resumed(
    straight: Path, configs: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logdir = cut_after(straight / "diffusion-muon", tmp_path / "run", 3)
    shard = step_folder(logdir, 3) / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    with caplog.at_level(logging.INFO):
        run(configs["diffusion"], logdir, *SAVE_LAST, *MUON["diffusion"])
    size = shard.stat().st_size
    damage = f"{step_folder(logdir, 3)}: __0_0.distcp has {size} bytes, its manifest says"
    assert any(damage in message for message in caplog.messages)
    assert f"resumed {step_folder(logdir, 2)}" in caplog.messages
    assert_same_end(logdir, straight / "diffusion-muon")


# ---- stopped by a signal

INTERRUPTIBLE = ("steps=30",)


def main_with_signal(arguments: list[str], logdir: Path, sender: int, delay_s: float) -> int:
    """train.main(arguments) on this rank; rank `sender` sends itself Ctrl-C in mid-run."""

    def interrupt() -> None:
        deadline = time.monotonic() + 60.0
        while not (logdir / "metrics.jsonl").is_file() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(delay_s)
        os.kill(os.getpid(), signal.SIGINT)

    if int(os.environ["RANK"]) == sender:
        threading.Thread(target=interrupt, daemon=True).start()
    return train.main(arguments)


def command(path: Path, logdir: Path, overrides: Iterable[str]) -> list[str]:
    return ["--config_path", str(path), "--logdir", str(logdir), "--disable-wandb", *overrides]


@pytest.fixture(scope="module")
def uninterrupted(base: Path, configs: dict[str, Path]) -> Path:
    """A longer run that nobody stops."""
    return run(configs["dmd"], base / "uninterrupted", *INTERRUPTIBLE)


@pytest.mark.parametrize("sample", range(2))
def test_a_run_stopped_by_ctrl_c_exits_130_and_ends_as_the_unstopped_run(
    sample: int, uninterrupted: Path, configs: dict[str, Path], tmp_path: Path
) -> None:
    logdir, delay = tmp_path / "run", random.Random(sample).uniform(0.0, 0.2)
    words = command(configs["dmd"], logdir, INTERRUPTIBLE)
    assert run_on_ranks(1, main_with_signal, words, logdir, 0, delay) == [130]
    stopped_at = checkpoint.latest(logdir / "checkpoints")
    assert stopped_at is not None
    assert 0 < checkpoint.step_of(stopped_at) < 30
    run(configs["dmd"], logdir, *INTERRUPTIBLE)
    assert_same_end(logdir, uninterrupted, step=30)


@pytest.mark.slow
def test_ctrl_c_on_one_of_two_ranks_stops_both_after_the_same_step(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    logdir = tmp_path / "run"
    words = command(configs["diffusion"], logdir, ["steps=400"])
    assert run_on_ranks(2, main_with_signal, words, logdir, 1, 0.1) == [130, 130]
    assert checkpoint.latest(logdir / "checkpoints") is not None


# ---- another run, and a run gone wrong


def test_the_log_directory_of_another_run_is_refused_with_the_keys_that_differ(
    straight: Path, configs: dict[str, Path]
) -> None:
    logdir = straight / "dmd-muon"
    before = (logdir / "config.yaml").read_bytes()
    with (
        pytest.raises(ConfigError) as caught,
        built(configs["dmd"], logdir, *MUON["dmd"], "seed=7", "critic.lr=0.5", "steps=9"),
    ):
        pytest.fail("another run's directory was accepted")
    assert str(caught.value) == (
        f"{logdir}: holds another run; use a new --logdir, or restore: "
        "critic.lr: is 0.001, now 0.5; seed: is 0, now 7"
    )
    assert (logdir / "config.yaml").read_bytes() == before


def test_a_run_goes_on_with_more_steps_and_another_save_interval(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    constant = "generator.schedule=constant"  # a decaying schedule depends on the last step
    run(configs["diffusion"], tmp_path / "run", constant, "steps=2")
    run(configs["diffusion"], tmp_path / "run", constant, "steps=5", "save_every=2")
    run(configs["diffusion"], tmp_path / "whole", constant, "steps=5")
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert saved == ["step_000002", "step_000004", "step_000005"]


def poison_before(trainer: Trainer, step: int) -> None:
    """Make one weight NaN just before `step` trains, as a fault in memory would."""
    phases = trainer.phases

    def poisoned(at: int) -> Iterable[Phase]:
        if at == step:
            with torch.no_grad():
                trainer.roles["generator"].network.model.head.head.weight[0, 0] = float("nan")
        return phases(at)

    trainer.phases = poisoned  # type: ignore[method-assign]


def run_poisoned(path: Path, logdir: Path, step: int, *overrides: str) -> str:
    """What a run says that is poisoned before `step`."""
    with built(path, logdir, *overrides) as trainer:
        poison_before(trainer, step)
        with pytest.raises(RunFailedError) as caught:
            trainer.train()
    message = str(caught.value)
    del trainer, caught
    gc.collect()  # the traceback held the trainer in a cycle; LMDB opens a folder only once
    return message


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_good_checkpoint(
    straight: Path, configs: dict[str, Path], tmp_path: Path
) -> None:
    logdir = tmp_path / "run"
    message = run_poisoned(configs["diffusion"], logdir, 3, *SAVE_ALL, *MUON["diffusion"])
    assert message == (
        "step 4: generator/grad_norm, generator/loss not finite; the last good checkpoint is "
        f"{step_folder(logdir, 3)}. Lower the learning rate or max_grad_norm and start again."
    )
    run(configs["diffusion"], logdir, *SAVE_LAST, *MUON["diffusion"])
    assert_same_end(logdir, straight / "diffusion-muon")


def test_a_loss_that_is_not_finite_between_logs_stops_the_run_before_the_next_save(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    logdir = tmp_path / "run"
    settings = ("steps=8", "log_every=100", "save_every=2")
    assert run_poisoned(configs["diffusion"], logdir, 4, *settings).startswith("step 6: ")
    assert checkpoint.latest(logdir / "checkpoints") == step_folder(logdir, 4)
    state = read_state(step_folder(logdir, 4))
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    assert all(bool(torch.isfinite(value).all()) for value in tensors)
