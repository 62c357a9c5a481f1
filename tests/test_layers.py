"""Who imports whom: utils < model < pipeline < trainer < entry points; model/wan stands apart."""

from __future__ import annotations

import ast

from tests.methods import methods
from tests.sources import PACKAGES, Source, sources

# Imported where they are used: optional, or so slow that most commands should not pay for them.
LATE = {
    "diffusers",
    "flash_attn",
    "flask",
    "matplotlib",
    "tokenizers",
    "transformers",
    "wandb",
}
RANKS = {name: rank for rank, name in enumerate(PACKAGES)}
ENTRY_POINTS = {source.top for source in sources()} - RANKS.keys()
# These join methods with pipelines; everything else knows one side only.
COMPOSERS = {"trainer.build", "trainer.config", "trainer.serving"}


def top(name: str) -> str:
    """The package of a module."""
    return name.partition(".")[0]


def rank(name: str) -> int:
    """The layer of a module of this project."""
    return RANKS.get(top(name), len(RANKS))


def own(source: Source) -> set[str]:
    """The modules of this project that a file imports."""
    return {name for _, name in source.imports() if top(name) in RANKS.keys() | ENTRY_POINTS}


def test_no_file_imports_from_a_layer_above_its_own() -> None:
    upward = [
        f"{source} imports {name}"
        for source in sources()
        for name in own(source)
        if rank(name) > rank(source.module)
    ]
    assert not upward


def test_the_transformer_knows_only_itself_and_the_leaves() -> None:
    foreign = [
        f"{source} imports {name}"
        for source in sources()
        if source.module.startswith("model.wan.")
        for name in own(source)
        if not name.startswith(("model.wan", "utils"))
    ]
    assert not foreign


def test_imports_are_absolute() -> None:
    relative = [
        f"{source} imports {name}"
        for source in sources()
        for _, name in source.imports()
        if name.startswith(".")
    ]
    assert not relative


def test_only_slow_and_optional_libraries_are_imported_inside_functions() -> None:
    hidden = []
    for source in sources():
        functions = [n for n in ast.walk(source.tree) if isinstance(n, ast.FunctionDef)]
        inside = {id(node) for function in functions for node in ast.walk(function)}
        late = {top(name) for node, name in source.imports() if id(node) in inside}
        hidden += [f"{source} imports {name}" for name in late - LATE]
    assert not hidden


def test_slow_and_optional_libraries_are_imported_nowhere_else() -> None:
    early = [
        f"{source} imports {name}"
        for source in sources()
        if source.module != "demo"  # it is the web page, and nothing without flask
        for node, name in source.imports()
        if node in source.tree.body and top(name) in LATE
    ]
    assert not early


def test_only_the_composition_root_knows_both_methods_and_pipelines() -> None:
    of_methods = {cls.__module__ for cls in methods()}
    both = {
        source.module
        for source in sources()
        if own(source) & of_methods and any(top(name) == "pipeline" for name in own(source))
    }
    assert both <= COMPOSERS


def test_models_and_pipelines_do_not_speak_to_other_ranks() -> None:
    distributed = {
        name
        for source in sources()
        if source.top in ("model", "pipeline")
        for _, name in source.imports()
        if name.startswith("torch.distributed")
    }
    assert distributed <= {"torch.distributed.device_mesh"}  # where to load, as a type
