"""Habits of this code that a machine can check."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence

from tests.sources import PACKAGES, ROOT, Source, sources

TESTS = tuple(Source(p.relative_to(ROOT)) for p in sorted((ROOT / "tests").rglob("*.py")))
EVERYTHING = sources() + TESTS
SEEDED = {"bernoulli", "multinomial", "normal", "rand", "randint", "randn", "randperm"}
UNSEEDABLE = {"rand_like", "randint_like", "randn_like"}
MAX_LINES = 400
MAX_FUNCTION_LINES = 60


def calls(wrong: Callable[[str, ast.Call], bool], where: Sequence[Source] = sources()) -> list[str]:
    """The calls that `wrong(dotted name, call)` finds, as file:line: name."""
    return [
        f"{source}:{node.lineno}: {ast.unparse(node.func)}"
        for source in where
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and wrong(ast.unparse(node.func), node)
    ]


def last(name: str) -> str:
    """The last part of a dotted name."""
    return name.rpartition(".")[2]


def test_every_file_opens_with_a_sentence() -> None:
    first_lines = {s: (ast.get_docstring(s.tree) or "").partition("\n")[0] for s in EVERYTHING}
    assert not [str(s) for s, line in first_lines.items() if not line.endswith((".", ":"))]


def test_sources_are_ascii() -> None:
    assert not [str(source) for source in EVERYTHING if not source.text.isascii()]


def test_files_stay_short() -> None:
    assert not [str(s) for s in sources() if len(s.text.splitlines()) > MAX_LINES]


def test_functions_stay_short() -> None:
    long = [
        f"{source}:{node.lineno}: {node.name} has {(node.end_lineno or 0) - node.lineno + 1} lines"
        for source in EVERYTHING
        for node in ast.walk(source.tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert not long


def test_random_numbers_come_from_a_generator() -> None:
    def bare(name: str, call: ast.Call) -> bool:
        seeded = "generator" in {keyword.arg for keyword in call.keywords}
        return name.startswith("torch.") and last(name) in SEEDED and not seeded

    assert not calls(bare)


def test_nothing_draws_from_a_global_random_state() -> None:
    assert not calls(
        lambda name, _: last(name) in UNSEEDABLE or name.startswith(("np.random.", "random."))
    )


def test_only_commands_print() -> None:
    quiet = [s for s in sources() if s.top in PACKAGES and s.module != "utils.cli"]
    assert not calls(lambda name, _: name == "print", quiet)


def test_configuration_is_never_asked_whether_a_key_exists() -> None:
    def probes(name: str, call: ast.Call) -> bool:
        asks = name == "hasattr" or (name == "getattr" and len(call.args) > 2)
        return asks and "config" in ast.unparse(call.args[0]).lower()

    assert not calls(probes)


def test_nothing_empties_the_cache_of_the_device() -> None:
    assert not calls(lambda name, _: last(name) == "empty_cache")


def test_errors_for_users_are_of_their_own_class() -> None:
    """A plain ValueError is an invariant of ours; one more needs a place in this list."""
    invariants = {
        "model.experts", "model.guidance", "model.wan.cache", "model.wan.images",
        "model.wan.transformer", "model.wan_wrapper", "pipeline.generator", "pipeline.request",
        "utils.data.shards", "utils.optim", "utils.tiny_world.checker",
    }  # fmt: skip
    plain = {"ValueError": invariants, "OSError": {"utils.files"}}
    plain |= {name: set() for name in ("FileNotFoundError", "FileExistsError")}
    assert not [
        f"{source}:{node.lineno}: {name}, use utils.errors"
        for source in sources()
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
        for name in [ast.unparse(node.exc.func)]
        if name in plain and source.module not in plain[name]
    ]


def test_a_todo_names_who_and_what_ends_it() -> None:
    todos = [
        f"{source}: {line.strip()}"
        for source in sources()
        for line in source.text.splitlines()
        if "TODO" in line
    ]
    assert not [todo for todo in todos if "TODO(" not in todo or "):" not in todo]


def test_no_folder_of_a_developers_machine_is_named() -> None:
    homes = ("/ho" + "me/", "/wo" + "rk/", "/Us" + "ers/")
    assert not [str(s) for s in EVERYTHING for home in homes if home in s.text]
