"""Who imports whom: utils < model < pipeline < trainer < entry points, and rooms inside of them."""

from __future__ import annotations

import ast
import re

import pytest

from tests.methods import methods
from tests.sources import PACKAGES, ROOT, Source, sources

# Imported where they are used: optional, or so slow that most commands should not pay for them.
LATE = {
    "diffusers",
    "flash_attn",
    "flask",
    "matplotlib",
    "tokenizers",
    "torch.utils.tensorboard",
    "tensorboard",
    "transformers",
    "wandb",
}
RANKS = {name: rank for rank, name in enumerate(PACKAGES)}
ENTRY_POINTS = {source.top for source in sources()} - RANKS.keys()
# What other rooms may import of model/families/.
INTERFACE = {"model.families.base", "model.families.registry"}
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


def module_imports(source: Source) -> set[str]:
    """The modules of this project that a file needs, `from package import module` taken apart."""
    modules = {other.module for other in sources()}
    named = {
        f"{node.module}.{alias.name}"
        for node, _ in source.imports()
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return (own(source) | named) & modules - {source.module}


def test_no_file_imports_itself_by_way_of_others() -> None:
    needs = {source.module: module_imports(source) for source in sources()}
    while needs:  # whoever needs nothing that is left can be in no circle
        done = {module for module, others in needs.items() if not others & needs.keys()}
        assert done, f"import circles among {sorted(needs)}"
        needs = {module: others for module, others in needs.items() if module not in done}


# What the files of a folder may import beside that folder and plain leaves (utils/*.py).
ROOMS: dict[str, tuple[str, ...]] = {
    "utils.data": ("utils.media",),  # records come with pictures and clips
    "utils.media": ("utils.data.prompts",),  # names and first frames of what prompts ask for
    "utils.tiny_world": ("utils.media.frame_groups",),
    "utils.health": (),
    "utils.web": ("utils.health",),  # pages show figures
    "model.wan": (),
    "model.encoders": ("model.folders", "utils.media.frame_groups"),
    # Adapter files have names of their own, which are Wan's whatever family a folder is of.
    "model.folders": (
        "model.adapters",
        "model.discriminator",
        "model.types",
        "model.wan.adapter_names",
        "model.wan.heads",
    ),
}


UTILS_ROOMS = tuple(room for room in ROOMS if room.startswith("utils."))


def plain_leaf(name: str) -> bool:
    """Whether a module lies in utils itself, in no room of it."""
    return top(name) == "utils" and not name.startswith(UTILS_ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_knows_only_itself_plain_leaves_and_what_is_listed(room: str) -> None:
    foreign = [
        f"{source} imports {name}"
        for source in sources()
        if f"{source.module}.".startswith(f"{room}.")
        for name in module_imports(source)
        if not f"{name}.".startswith(tuple(f"{known}." for known in (room, *ROOMS[room])))
        and not plain_leaf(name)
    ]
    assert not foreign


def test_only_a_family_knows_its_folders_sizes_and_networks() -> None:
    """Nothing else names one, so that another can stand in its place."""
    rooms = ("model.families.", "model.wan.", "model.wan_wrapper")
    private = (
        "model.wan.config",
        "model.wan.transformer",
        "model.wan.weights",
        "model.wan_wrapper",
    )
    # They make, or time, a family's own models.
    makers = {
        "scripts.make_tiny_world",
        "scripts.benchmark_rollout",
        "scripts.benchmarking.attention",
        "scripts.benchmarking.meters",
        "scripts.benchmarking.shapes",
        "scripts.benchmarking.yardstick",
        "scripts.benchmark_threads",
    }
    foreign = [
        f"{source} imports {name}"
        for source in sources()
        if not source.module.startswith(rooms) and source.module not in makers
        for name in own(source)
        if name.startswith(private)
        or (name.startswith("model.families.") and name not in INTERFACE)
    ]
    assert not foreign


def test_plain_leaves_know_neither_video_nor_diffusion() -> None:
    foreign = [
        f"{source} imports {name}"
        for source in sources()
        if plain_leaf(source.module)
        for name in module_imports(source)
        if not plain_leaf(name)
    ]
    assert not foreign


def test_methods_know_no_model_folders_and_no_encoders() -> None:
    files = {cls.__module__ for cls in methods()}
    rooms = ("model.encoders", "model.folders", "model.families")
    foreign = [
        f"{source} imports {name}"
        for source in sources()
        if source.module in files
        for name in module_imports(source)
        if name.startswith(rooms)
    ]
    assert not foreign


def test_each_package_says_in_a_sentence_what_lives_there() -> None:
    folders = {source.path.parent for source in sources() if source.top in PACKAGES}
    silent = []
    for folder in sorted(folders):
        init = ROOT / folder / "__init__.py"
        said = ast.get_docstring(ast.parse(init.read_text())) if init.is_file() else None
        if not said or not said.endswith("."):
            silent.append(str(folder))
    assert not silent


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
        late = {
            name if name in LATE else top(name)
            for node, name in source.imports()
            if id(node) in inside
        }
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


def test_the_architecture_page_names_the_owner_of_each_file() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = [line for line in page.splitlines() if line.startswith("| `")]
    named = [name for line in table for name in re.findall(r"`([\w/.]+\.py)`", line.split("|")[1])]
    files = [str(source) for source in sources() if source.path.name != "__init__.py"]
    by_rule = {f"{cls.__module__.replace('.', '/')}.py" for cls in methods()}  # a method each
    assert sorted(set(files) - set(named) - by_rule) == []  # no owner
    assert sorted(set(named) - set(files)) == []  # no such file
    assert sorted(name for name in set(named) if named.count(name) > 1) == []  # two owners
