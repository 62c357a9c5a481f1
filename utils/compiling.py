"""Blocks compiled as one graph each, where the compiler keeps what it made, and what it takes."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from utils.start import COMPILED

log = logging.getLogger(__name__)

# Graphs per block of code before torch gives up: networks differ in precision and in what learns,
# passes in shape and in whether they report; a self-forcing run with three networks makes about 20.
LIMIT = 64


class Compilable(Protocol):
    """A block whose arguments may have a size that grows from call to call."""

    grows: ClassVar[tuple[int, ...]]  # positions of arguments whose tensors grow along axis 1


def compile_blocks(blocks: nn.ModuleList, *, backend: str = "inductor") -> None:
    """Compile each block's forward pass as one graph; one graph serves all equal blocks. In place.

    A block may name, in `grows`, positions of arguments whose tensors differ in their second axis
    from call to call, as a past does: their size is a variable of the graph, every other size a
    constant. Names of weights stay as they are. A graph that would break is an error.
    """
    # torch loads its compiler when it is first spoken of, which takes a second.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, LIMIT)
    for block in blocks:
        grows = cast(Compilable, block).grows if hasattr(block, "grows") else ()
        compiled = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=backend)
        block.forward = Compiled(compiled, grows)


@dataclass(frozen=True, eq=False)
class Compiled:
    """A compiled forward pass that says when it compiled, and how long that took."""

    forward: Callable[..., Any]
    grows: tuple[int, ...] = ()

    def __call__(self, *args: Any, **words: Any) -> Any:
        """What `forward` returns."""
        for position in self.grows:
            if position < len(args):
                mark_growing(args[position])
        graphs, start = graphs_made(), time.perf_counter()
        result = self.forward(*args, **words)
        if graphs_made() > graphs:
            seconds = time.perf_counter() - start
            log.info("compiled a block's graph number %d in %.1f s", graphs_made(), seconds)
        return result


def mark_growing(argument: object) -> None:
    """Let the sizes of its tensors [B, N, ...] along N be variables of the graph."""
    for leaf in tree_leaves(argument):
        if isinstance(leaf, Tensor):
            torch._dynamo.mark_dynamic(leaf, 1)


def graphs_made() -> int:
    """How many graphs this process has compiled."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def say_where_graphs_are_kept() -> None:
    """Log the compiler's folder, and whether a first step will find anything there."""
    folder = Path(os.environ.get(COMPILED) or tempfile.gettempdir())
    held = COMPILED in os.environ and folder.is_dir() and any(folder.iterdir())
    log.info(
        "blocks are compiled at their first call; graphs are kept in %s (%s)",
        folder,
        "some are there" if held else "none are there yet: the first step takes minutes",
    )
