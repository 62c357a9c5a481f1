"""Configurations and prompts that Fewstep ships, found from any folder."""

from __future__ import annotations

import logging
from pathlib import Path

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent  # of a checkout, or where the wheel was installed
FOLDERS = ("configs", "prompts")


def find(path: Path) -> Path:
    """`path`; or, where nothing is there, what Fewstep ships under that name, with a log line."""
    inside = path.parts[:1] and path.parts[0] in FOLDERS and ".." not in path.parts
    if not inside or path.exists() or not (ROOT / path).exists():
        return path
    log.info("%s: not in this folder; taking the shipped one, %s", path, ROOT / path)
    return ROOT / path
