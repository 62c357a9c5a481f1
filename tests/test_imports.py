"""Every module imports, fast, and without the libraries that only some commands need."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from tests.sources import ROOT, sources

MODULES = sorted(source.module for source in sources() if source.module != "setup")
HEAVY = ("diffusers", "flash_attn", "matplotlib", "tokenizers", "transformers", "wandb")


def python(code: str) -> str:
    """What `code` prints in a fresh interpreter at the repository root."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports(name: str) -> None:
    importlib.import_module(name)


def test_training_starts_without_loading_what_it_may_not_need() -> None:
    loaded = python("import sys, train; print(*sys.modules)").split()
    assert not {"flask", "werkzeug", *HEAVY} & set(loaded)


def test_everything_imports_where_heavy_libraries_are_not_installed() -> None:
    python(
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({HEAVY}))\n"
        f"for name in {MODULES}: importlib.import_module(name)"
    )
