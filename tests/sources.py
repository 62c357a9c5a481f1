"""The project's own source files, for tests that read code instead of running it."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("utils", "model", "pipeline", "trainer")  # lower ones first


@dataclass(frozen=True)
class Source:
    """One Python file."""

    path: Path  # from the repository root

    @property
    def module(self) -> str:
        """The name under which it is imported."""
        return ".".join(self.path.with_suffix("").parts).removesuffix(".__init__")

    @property
    def top(self) -> str:
        """The first part of that name."""
        return self.path.with_suffix("").parts[0]

    @functools.cached_property
    def text(self) -> str:
        """Its content."""
        return (ROOT / self.path).read_text(encoding="utf-8")

    @functools.cached_property
    def tree(self) -> ast.Module:
        """Its syntax tree."""
        return ast.parse(self.text)

    def imports(self) -> Iterator[tuple[ast.stmt, str]]:
        """Each import anywhere in the file: the statement, and the name that it imports."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield node, "." * node.level + (node.module or "")

    def __str__(self) -> str:
        return str(self.path)


@functools.cache
def sources() -> tuple[Source, ...]:
    """Packages, scripts and entry points; not the tests."""
    folders = [*PACKAGES, "scripts"]
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    files += sorted(ROOT.glob("*.py"))
    return tuple(Source(file.relative_to(ROOT)) for file in files)
