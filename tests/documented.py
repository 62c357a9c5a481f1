"""The commands that the pages show, as words."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from tests.sources import ROOT

PAGES = (
    "README.md",
    "docs/methods.md",
    "docs/evaluation.md",
    "docs/health.md",
)  # the others have their own tests


def documented(page: str) -> list[list[str]]:
    """The commands of a page's bash blocks, as words."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line) for line in lines if line.strip()]


def script_of(words: Sequence[str]) -> str:
    """The file name of the script that a command calls."""
    return next(Path(word).name for word in words if word.endswith((".py", ".sh")))
