"""train.py as its user meets it: exit status, one line of error, files, signals, torchrun."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import lmdb
import pytest
import torch

import train
from model.families.tiny_world import TinyWorld
from model.wan.config import WanConfig
from tests.commands import ROOT, main_and_stderr, no_weights, own_logging, refusal
from tests.conftest import build_wan
from tests.ranks import run_on_ranks
from tests.runs import rows, run, step_folder, write_config
from utils import checkpoint
from utils.data.shards import ShardWriter
from utils.weights import write_weights

__all__ = ["no_weights", "own_logging"]


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory, tiny_root: Path) -> dict[str, Path]:
    """The config file of each method."""
    folder = tmp_path_factory.mktemp("train_cli")
    return {name: write_config(folder, tiny_root, name) for name in ("dmd", "diffusion")}


def words(config: Path, logdir: Path, *more: str) -> list[str]:
    """The command line of a run."""
    return ["--config_path", str(config), "--logdir", str(logdir), "--disable-wandb", *more]


def test_a_run_returns_0_and_leaves_config_metrics_and_checkpoint(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    assert train.main(words(configs["diffusion"], tmp_path, "steps=2")) == 0
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == [
        "checkpoints", "config.yaml", "fingerprint.json", "history.jsonl", "last_save.json",
        "metrics.jsonl", "report.html",
    ]  # fmt: skip
    assert checkpoint.latest(tmp_path / "checkpoints") == step_folder(tmp_path, 2)


def test_flags_and_settings_may_come_in_any_order(configs: dict[str, Path], tmp_path: Path) -> None:
    line = ["steps=1", "--logdir", str(tmp_path), "batch_size=1", "--no_save", "--config_path"]
    assert train.main([*line, str(configs["diffusion"]), "log_every=1"]) == 0
    assert [row["step"] for row in rows(tmp_path)] == [1]
    assert not (tmp_path / "checkpoints").exists()


def test_no_visualize_makes_no_picture(configs: dict[str, Path], tmp_path: Path) -> None:
    line = words(configs["dmd"], tmp_path, "steps=1", "validation.every=1", "validation.count=1")
    assert train.main([*line, "--no_visualize"]) == 0
    assert not (tmp_path / "samples").exists()
    assert train.main([*line, "steps=2"]) == 0
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step_000002.png"]


# ---- bad input


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "critic.lrr=1",
            "command line: unknown key 'critic.lrr' (did you mean 'critic.lr'?)",
        ),
        (
            "guidance_scale=5",
            "command line: unknown key 'guidance_scale': "
            "write loss.cfg_scale, which is guidance_scale + 1",
        ),
        (
            "steps=many",
            "command line: steps: Value 'many' of type 'str' could not be converted to Integer",
        ),
        (
            "steps",
            "command line: 'steps' is neither a known flag nor key=value",
        ),
        (
            "accumulation=3",
            "accumulation: 3 micro-batches must divide batch_size=4",
        ),
        (
            "generator.lr=-1",
            "generator.lr: must be positive and finite, got -1.0",
        ),
        (
            "validation.count=0",
            "validation.count: must be at least 1, got 0",
        ),
        (
            "data.path=nowhere",
            "nowhere: no such data; give a .txt file with one prompt per line, a folder of .txt "
            "files with one prompt each, or a folder of LMDB shards",
        ),
        (
            "validation.prompts=nowhere.txt",
            "nowhere.txt: no such prompt file (one prompt per line)",
        ),
        (
            "latent_shape=[8,5,4,4]",
            "latent_shape: has 8 channels, {models}/Wan2.1-T2V-Tiny makes 16",
        ),
        (
            "latent_shape=[16,5,3,4]",
            "latent_shape: 3 x 4 does not divide into patches of 2 x 2",
        ),
        (
            "generator.model=Wan2.1-T2V-Tony",
            "model 'Wan2.1-T2V-Tony': no folder {models}/Wan2.1-T2V-Tony "
            "(it holds ['Wan2.1-I2V-Tiny', 'Wan2.1-T2V-Tiny', 'Wan2.2-TI2V-Tiny']); did you mean "
            "'Wan2.1-T2V-Tiny'?",
        ),
        (
            "trainer=foo",
            "command line: trainer: 'foo' is unknown, choose one of score_distillation, "
            "diffusion, gan, ode",
        ),
        (
            "trainer=gann",
            "command line: trainer: 'gann' is unknown, choose one of score_distillation, "
            "diffusion, gan, ode; did you mean 'gan'?",
        ),
        (
            "latent_shape=abc",
            "command line: latent_shape: must be a list, such as [16, 21, 60, 104]; got 'abc'",
        ),
        (
            "generator=5",
            "command line: generator: is a section, with keys such as generator.lr; got the "
            "value 5",
        ),
        (
            "generator=[1]",
            "command line: generator: is a section, with keys such as generator.lr; got the "
            "value [1]",
        ),
        (
            "[=1",
            "command line: '[=1' is not readable: list index out of range",
        ),
        (
            "generator.model={models}/Wan2.1-T2V-Tiny/config.json",
            "{models}/Wan2.1-T2V-Tiny/config.json: is a file; a model is a folder, and weights in "
            "a file are named by `weights`",
        ),
        (
            "generator.weights=nowhere",
            "nowhere: no weights here; give a model folder, a .safetensors or .pt file, a "
            "training checkpoint (checkpoints/step_N), or the log directory of a run",
        ),
    ],
)
def test_a_bad_setting_gives_one_line_and_no_log_directory(
    setting: str,
    message: str,
    configs: dict[str, Path],
    tiny_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    setting = setting.replace("{models}", str(tiny_root / "wan_models"))
    line = words(configs["dmd"], tmp_path / "run", setting)
    expected = message.format(models=tiny_root / "wan_models")
    assert refusal(train.main, line, capsys) == expected
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_weights")
def test_a_wrong_trainer_is_told_before_the_settings_of_the_right_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = words(ROOT / "configs" / "tiny" / "gan.yaml", tmp_path / "run", "trainer=foo")
    assert refusal(train.main, line, capsys).startswith("command line: trainer: 'foo' is unknown")


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("setting", "much"),
    [
        ("batch_size=100000000", "batch_size: 100000000 samples at once of latent_shape [16, 5, "),
        ("latent_shape=[16,100001,64,64]", "batch_size: 4 samples at once of latent_shape [16, 1"),
    ],
)
def test_absurd_sizes_are_refused_with_the_memory_that_they_would_take(
    setting: str,
    much: str,
    configs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    message = refusal(train.main, words(configs["dmd"], tmp_path / "run", setting), capsys)
    assert message.startswith(much)
    assert re.search(r"take [\d,]+ GiB at least, and this device has [\d,]+ GiB; lower ", message)


@pytest.mark.usefixtures("no_weights")
def test_every_bad_setting_gets_a_line_of_its_own(
    configs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(words(configs["dmd"], tmp_path, "steps=0", "ema.decay=1")) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: steps: must be at least 1, got 0",
        "error: ema.decay: must lie in [0, 1), got 1.0",
    ]


@pytest.mark.usefixtures("no_weights")
def test_a_missing_config_file_is_named_with_its_nearest_neighbour(
    configs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = configs["dmd"].with_name("dmb.yaml")
    assert refusal(train.main, words(path, tmp_path), capsys) == (
        f"{path}: no such config file (did you mean {configs['dmd']}?)"
    )


@pytest.mark.usefixtures("no_weights")
def test_an_empty_prompt_file_is_refused(
    configs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n", encoding="utf-8")
    line = words(configs["dmd"], tmp_path / "run", f"data.path={empty}")
    assert refusal(train.main, line, capsys) == f"{empty}: holds no prompt; write one per line"


@pytest.mark.usefixtures("no_weights")
def test_a_folder_that_is_no_model_is_refused_with_all_that_it_lacks(
    configs: dict[str, Path], tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny_root / "wan_models" / "Wan2.1-T2V-Tiny", tmp_path / "broken")
    (folder / "patch_codec.safetensors").unlink()
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    line = words(configs["dmd"], tmp_path / "run", f"generator.model={folder}")
    message = refusal(train.main, line, capsys)
    assert message == (
        f"{folder}: not a complete model folder: missing "
        "diffusion_pytorch_model.safetensors.index.json or diffusion_pytorch_model.safetensors or "
        "transformer/diffusion_pytorch_model.safetensors.index.json or "
        "transformer/diffusion_pytorch_model.safetensors; "
        "patch_codec.safetensors "
        "(found ['config.json', 'google', 'models_t5_umt5-xxl-enc-bf16.pth']); "
        "copy what is missing from the release that the folder was made of"
    )


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_of_another_architecture_are_refused(
    suffix: str,
    configs: dict[str, Path],
    tiny_config: WanConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wider = build_wan(replace(tiny_config, dim=48, ffn_dim=96, num_layers=1))
    path = tmp_path / f"wider{suffix}"
    write_weights(wider.state_dict(), path, {})
    line = words(configs["dmd"], tmp_path / "run", f"teacher.weights={path}")
    message = refusal(train.main, line, capsys)
    assert message.startswith(f"{path} does not fit teacher ")
    assert "27 weights missing ['blocks.1." in message
    assert message.endswith(
        "is it a checkpoint of another architecture? They look like t2v with dim 48, ffn_dim 96, "
        "1 layers, in_dim 26; expected t2v with dim 32, ffn_dim 64, 2 layers, in_dim 26"
    )


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_that_is_no_weights_is_refused(
    suffix: str, configs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"garbage{suffix}"
    path.write_bytes(b"not weights at all")
    line = words(configs["dmd"], tmp_path / "run", f"teacher.weights={path}")
    assert refusal(train.main, line, capsys).startswith(f"{path}: not ")


@pytest.mark.usefixtures("no_weights")
def test_diffusion_without_latents_is_refused(
    configs: dict[str, Path], tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tiny_root / "data" / "tiny" / "prompts.txt"
    line = words(configs["diffusion"], tmp_path / "run", f"data.path={prompts}")
    assert refusal(train.main, line, capsys) == (
        f"data.path: method 'diffusion' needs real latents, but {prompts} holds none"
    )


@pytest.mark.usefixtures("no_weights")
def test_latents_of_another_shape_are_refused(
    configs: dict[str, Path], tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = words(configs["diffusion"], tmp_path / "run", "latent_shape=[16,5,4,6]")
    latents = tiny_root / "data" / "tiny" / "latents"
    assert refusal(train.main, line, capsys) == (
        f"latent_shape: is [16, 5, 4, 6], but the latents in {latents} are [16, 5, 4, 4]"
    )


@pytest.fixture(scope="module")
def finished(configs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log directory of a finished diffusion run of 3 steps."""
    return run(configs["diffusion"], tmp_path_factory.mktemp("finished"), "steps=3")


def test_a_run_that_is_finished_says_that_nothing_is_left_to_do(
    configs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(configs["diffusion"], tmp_path, "steps=2")
    before = (tmp_path / "metrics.jsonl").read_bytes()
    for steps in (2, 1):
        assert train.main(words(configs["diffusion"], tmp_path, f"steps={steps}")) == 0
        assert (
            f"nothing is left to do: 2 steps are done, and steps={steps} asks for no more; raise "
            f"steps to go on" in capsys.readouterr().err
        )
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.usefixtures("no_weights")
def test_the_log_directory_of_another_run_is_refused(
    finished: Path, configs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    line = words(configs["diffusion"], finished, "steps=3", "batch_size=8", "ema.decay=0.9")
    assert refusal(train.main, line, capsys) == (
        f"{finished}: holds another run; use a new --logdir, restore what has changed, or continue "
        "all the same with --allow_config_change: batch_size: is 4, now 8; ema.decay: is 0.5, "
        "now 0.9"
    )


@pytest.mark.usefixtures("no_weights")
def test_a_file_in_the_place_of_the_log_directory_is_refused(
    configs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file"
    path.touch()
    assert refusal(train.main, words(configs["dmd"], path), capsys) == (
        f"--logdir {path}: is a file; give the name of a folder"
    )


@pytest.mark.parametrize("flag", ["--config_path", "--logdir"])
def test_a_missing_flag_is_named_by_the_parser(
    flag: str, configs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = words(configs["dmd"], tmp_path)
    at = line.index(flag)
    with pytest.raises(SystemExit) as caught:
        train.main(line[:at] + line[at + 2 :])
    assert caught.value.code == 2
    assert flag in capsys.readouterr().err


def test_a_diverging_run_returns_2_and_names_what_is_not_finite(
    configs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = words(configs["diffusion"], tmp_path, "generator.lr=1e30", "faults.max_skipped=2")
    assert train.main(line) == 2
    (message,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert message.startswith(
        "error: step 3: 2 generator updates of the last 100 steps had a loss or gradient that is "
        "not finite (faults.max_skipped=2); there is no checkpoint yet. Samples of the last one: "
    )
    assert "such as generator.lr=1e-6, on the same command line" in message


# ---- stopped before the first step


def test_ctrl_c_while_weights_load_exits_130_and_says_so(
    configs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        TinyWorld, "load_network", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)
    )
    assert train.main(words(configs["dmd"], tmp_path)) == 130
    assert "interrupted; run the same command again to continue" in capsys.readouterr().err


# ---- several processes


def train_stderr(line: list[str]) -> tuple[int, str]:
    return main_and_stderr(train.main, line)


def test_a_batch_that_does_not_divide_over_two_ranks_is_refused_once(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    line = words(configs["dmd"], tmp_path / "run", "batch_size=3")
    (status, text), quiet = run_on_ranks(2, train_stderr, line)
    assert (status, quiet) == (2, (2, ""))
    assert text == (
        "error: batch_size: 3 samples do not divide over 2 ranks x 1 micro-batches; "
        "use a multiple of 2\n"
    )


def torchrun(processes: int, script: str, line: list[str]) -> subprocess.CompletedProcess[str]:
    """A command under a real torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, "--nproc_per_node", str(processes), str(ROOT / script), *line],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_torchrun_on_two_processes_trains_as_one_process_does(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    settings = ("steps=2", "save_every=1")
    done = torchrun(2, "train.py", words(configs["dmd"], tmp_path / "two", *settings))
    assert done.returncode == 0, done.stderr
    assert train.main(words(configs["dmd"], tmp_path / "one", *settings)) == 0
    for row, expected in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    newest = checkpoint.latest(tmp_path / "two" / "checkpoints")
    assert newest == step_folder(tmp_path / "two", 2)
    names = set(json.loads((newest / "manifest.json").read_text(encoding="utf-8"))["files"])
    assert {"__0_0.distcp", "__1_0.distcp"} <= names


@pytest.mark.slow
def test_ctrl_c_on_the_real_command_exits_130_and_says_how_to_continue(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    command = [sys.executable, str(ROOT / "train.py")]
    process = subprocess.Popen(
        [*command, *words(configs["diffusion"], tmp_path, "steps=100000", "log_every=1")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "metrics.jsonl").is_file() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, text = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, text
    stopped_at = checkpoint.latest(tmp_path / "checkpoints")
    assert stopped_at is not None
    step = checkpoint.step_of(stopped_at)
    assert f"stopped after step {step}; run the same command again to continue" in text
    assert train.main(words(configs["diffusion"], tmp_path, f"steps={step + 1}")) == 0
    assert rows(tmp_path)[-1]["step"] == step + 1


def test_a_damaged_record_ends_a_run_with_a_line(
    tiny_root: Path, configs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = tmp_path / "shards"
    with ShardWriter(shards / "a") as writer:
        writer.append(["a red bar"], torch.zeros(1, 16, 5, 4, 4))
    with (
        contextlib.closing(lmdb.open(str(shards / "a"), lock=False)) as env,
        env.begin(write=True) as transaction,
    ):
        transaction.put(b"latents_0_data", b"short")
    line = words(configs["diffusion"], tmp_path / "run", f"data.path={shards}")
    assert train.main(line) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: no record could be read in place of record 0, 1 were tried: {shards}/a: "
        f"'latents_0_data' has 5 bytes, expected 2560 for 5 x 16 x 4 x 4 of float16; "
        f"mend the data, then run the same command again"
    )
