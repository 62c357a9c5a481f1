"""Every command that the README shows is run, in miniature, in a copy of what a clone holds."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

import train
from trainer.config import DEFAULT_CONFIG, load, method_class

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path != DEFAULT_CONFIG]
MINIATURE = {
    "make_tiny_world.py": ["--clips", "64"],
    "train.py": ["steps=2", "batch_size=4", "log_every=1", "validation.every=2"],
    "evaluate.py": ["--clips", "4"],
    "inference.py": [],
    "convert_checkpoint.py": [],
}


def documented(page: str) -> list[list[str]]:
    """The commands of a page's bash blocks, as words."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line) for line in lines if line.strip()]


def script_of(words: list[str]) -> str:
    return next(Path(word).name for word in words if word.endswith((".py", ".sh")))


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder that sees the repository's files, but not its runs, models or data."""
    folder = tmp_path_factory.mktemp("clone")
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in {line.split("/")[0] for line in names.splitlines()}:
        (folder / name).symlink_to(ROOT / name)
    return folder


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}


def run(words: list[str], folder: Path) -> None:
    done = subprocess.run(
        words,
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr[-3000:]}"


@pytest.mark.slow
def test_the_commands_of_the_readme_run_one_after_the_other(clone: Path) -> None:
    commands = [words for words in documented("README.md") if script_of(words) in MINIATURE]
    local = [words for words in commands if "--nnodes" not in words]
    assert {script_of(words) for words in local} == set(MINIATURE)
    for words in local:
        run([*words, *MINIATURE[script_of(words)]], clone)
    assert len(list((clone / "videos" / "tiny").glob("*.mp4"))) == 6
    assert (clone / "runs" / "tiny" / "evaluation" / "table.md").is_file()
    serve(next(w for w in documented("README.md") if script_of(w) == "demo.py"), clone)


def serve(words: list[str], folder: Path) -> None:
    """Start the demo, read its page, stop it as a user would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [port if before == "--port" else word for before, word in zip(["", *words], words)]  # noqa: B905
    server = subprocess.Popen(words, cwd=folder, env=environment(), stderr=subprocess.PIPE)
    try:
        page = ""
        for _ in range(240):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                    page = answer.read().decode()
                break
            except OSError:
                assert server.poll() is None, server.stderr.read() if server.stderr else ""
                time.sleep(0.25)
        assert "<video" in page or "prompt" in page
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) in (0, 130)


def test_the_cluster_command_of_the_readme_names_a_config_that_divides_over_its_ranks() -> None:
    words = next(words for words in documented("README.md") if "--nnodes" in words)
    config = load(ROOT / words[words.index("--config_path") + 1])
    assert config.batch_size % 64 == 0


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_every_shipped_configuration_takes_one_step_at_toy_size(
    path: Path, tiny_root: Path, tmp_path: Path
) -> None:
    needs_latents = method_class(load(path)).needs_latents
    data = tiny_root / "data" / "tiny" / ("latents" if needs_latents else "prompts.txt")
    toy = [
        f"model_root={tiny_root / 'wan_models'}",
        "generator.model=Wan2.1-T2V-Tiny",
        f"data.path={data}",
        "latent_shape=[16,5,4,4]",
        "steps=1",
        "batch_size=2",
        "validation.every=0",
    ]
    line = ["--config_path", str(path), "--logdir", str(tmp_path), "--disable-wandb", *toy]
    assert train.main(line) == 0
    assert (tmp_path / "checkpoints" / "step_000001").is_dir()


def test_the_shell_commands_of_the_readme_are_scripts_that_parse() -> None:
    scripts = [words[1] for words in documented("README.md") if words[0] == "bash"]
    assert scripts == ["scripts/quickstart.sh", "scripts/test.sh"]
    for script in scripts:
        subprocess.run(["bash", "-n", ROOT / script], check=True)


@pytest.mark.slow
def test_the_quickstart_runs_in_miniature_and_its_second_call_does_nothing_twice(
    tmp_path: Path,
) -> None:
    words = ["bash", "scripts/quickstart.sh", "--smoke", "--output_folder", str(tmp_path / "out")]
    run(words, ROOT)
    summary = (tmp_path / "out" / "summary.json").stat().st_mtime_ns
    weights = (tmp_path / "out" / "student" / "checkpoints" / "latest").stat().st_mtime_ns
    assert (tmp_path / "out" / "report.html").is_file()
    assert len(list((tmp_path / "out" / "videos").glob("*.mp4"))) == 12
    run(words, ROOT)
    assert (tmp_path / "out" / "summary.json").stat().st_mtime_ns > summary
    assert (tmp_path / "out" / "student" / "checkpoints" / "latest").stat().st_mtime_ns == weights
