"""What a wheel installs: every command and every shipped file, working from any folder."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fewstep import COMMANDS
from tests.commands import ROOT, own_logging
from utils import shipped
from utils.version import VERSION

__all__ = ["own_logging"]

SETUP = """
import json
from distutils.core import run_setup
distribution = run_setup("setup.py", ["-q"], stop_after="init")
command = distribution.get_command_obj("build_py")
command.ensure_finalized()
files = [name.removeprefix(command.build_lib + "/") for name in command.get_outputs(False)]
metadata = distribution.metadata
print(json.dumps({"files": files, "scripts": distribution.entry_points["console_scripts"],
                  "version": metadata.version, "about": metadata.long_description}))
"""


@pytest.fixture(scope="module")
def built() -> dict[str, list[str]]:
    """What setup.py would build, without building it."""
    pytest.importorskip("setuptools")
    words = [sys.executable, "-c", f"import setuptools\n{SETUP}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def tracked(*folders: str) -> set[str]:
    """The files of a clone below these folders."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split("\n")) - {""}


def test_every_file_that_commands_look_for_is_in_the_wheel(built: dict[str, list[str]]) -> None:
    wanted = tracked("configs", "prompts", "utils/web/page")
    wanted |= {
        n for n in tracked(*["model", "pipeline", "trainer", "utils", "scripts"]) if ".py" in n
    }
    wanted |= {path.name for path in ROOT.glob("*.py")} - {"setup.py"}
    assert len(wanted) > 100
    assert wanted - set(built["files"]) == set()


def test_nothing_but_the_project_is_in_the_wheel(built: dict[str, list[str]]) -> None:
    tops = {name.split("/")[0].removesuffix(".py") for name in built["files"]}
    assert tops == {
        "configs", "convert_checkpoint", "demo", "fewstep", "inference", "model", "pipeline",
        "prompts", "scripts", "train", "trainer", "utils",
    }  # fmt: skip


OF_LAUNCHERS = {"scripts.this_host"}  # which are shell scripts, and come with a clone


def test_every_script_is_a_command(built: dict[str, list[str]]) -> None:
    scripts = {f"scripts.{path.stem}" for path in (ROOT / "scripts").glob("*.py")} - OF_LAUNCHERS
    assert scripts | {"train", "inference", "demo", "convert_checkpoint"} == set(COMMANDS.values())
    assert built["scripts"] == [f"{name}=fewstep:main" for name in COMMANDS]


def test_the_package_says_what_it_is(built: dict[str, list[str]]) -> None:
    assert built["version"] == VERSION
    assert built["about"] == (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("module", COMMANDS.values())
def test_every_command_tells_its_version(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(module).main(["--version"])
    assert (caught.value.code, capsys.readouterr().out) == (0, f"Fewstep {VERSION}\n")


# ---- shipped files, from any folder


def test_what_is_not_here_is_taken_from_what_is_shipped_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("configs/tiny/dmd.yaml")
    with caplog.at_level("INFO"):
        assert shipped.find(path) == ROOT / path
    told = f"{path}: not in this folder; taking the shipped one, {ROOT / path}"
    assert caplog.messages == [told]


def test_what_is_here_comes_before_what_is_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "tiny.txt").write_text("mine", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert shipped.find(Path("prompts/tiny.txt")) == Path("prompts/tiny.txt")
    assert not caplog.messages


@pytest.mark.parametrize(
    "path", ["configs/none.yaml", "setup.py", "prompts/../setup.py", "/configs/tiny/dmd.yaml", ""]
)
def test_nothing_else_is_looked_for_elsewhere(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped.find(Path(path)) == Path(path)


# ---- a real wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder into which a wheel of this project was installed, without what it needs."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in tracked():  # builds write beside what they build
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).symlink_to(ROOT / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    wheel = ["wheel", str(source), "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*pip, *wheel], check=True)
    (file,) = folder.glob("fewstep-*.whl")
    target = folder / "site"
    subprocess.run([*pip, "install", str(file), "--no-deps", "--target", str(target)], check=True)
    yield target


def command(installed: Path, folder: Path, name: str, *words: str) -> str:
    """Run an installed command in `folder`; returns what it said."""
    done = subprocess.run(
        [str(installed / "bin" / name), *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"{name}: {done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_installed_wheel_trains_converts_and_samples_from_any_folder(
    installed: Path, tmp_path: Path
) -> None:
    short = ("steps=2", "batch_size=4", "log_every=1", "validation.every=2")
    weights = "wan_models/Wan2.1-T2V-Tiny/diffusion_pytorch_model.safetensors"

    def call(name: str, *words: str) -> str:
        return command(installed, tmp_path, f"fewstep-{name}", *words)

    call("make-tiny-world", "--clips", "64")
    teacher = ["--config_path", "configs/tiny/diffusion.yaml", "--logdir", "runs/teacher"]
    said = call("train", *teacher, "--disable-wandb", *short)
    config = installed / "configs" / "tiny" / "diffusion.yaml"
    assert (
        f"configs/tiny/diffusion.yaml: not in this folder; taking the shipped one, {config}" in said
    )
    call("convert", "--input_path", "runs/teacher", "--output_path", weights, "--use_ema")
    student = ["--config_path", "configs/tiny/dmd.yaml"]
    call("train", *student, "--logdir", "runs/student", "--disable-wandb", *short)
    call(
        "inference", *student, "--checkpoint_path", "runs/student", "--use_ema",
        "--data_path", "prompts/tiny.txt", "--output_folder", "videos", "--fps", "8",
    )  # fmt: skip
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 6
    call("validate-dataset", "--data_path", "data/tiny/latents")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_installed_command_tells_how_it_is_used(installed: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in (installed / "bin").glob("fewstep-*")) == sorted(COMMANDS)
    for name in COMMANDS:
        assert f"usage: {name}" in command(installed, tmp_path, name, "--help")
    assert command(installed, tmp_path, "fewstep-train", "--version") == f"Fewstep {VERSION}\n"
