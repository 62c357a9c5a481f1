"""Layered configuration: merge mappings into a frozen dataclass, and say which key is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import Container, DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from utils.errors import UserError

T = TypeVar("T")

OMITTED = ("full_key", "object_type", "reference_type")  # lines of OmegaConf's messages


class ConfigError(UserError):
    """A configuration that its user can mend; the message holds one problem per line."""


@dataclass(frozen=True)
class Layer:
    """One source of settings; later layers win. `source` is what error messages call it."""

    source: str
    values: DictConfig


def read_yaml(path: Path) -> Layer:
    """Read one YAML file as a layer. Raises ConfigError if it is missing or not a mapping."""
    if not path.is_file():
        siblings = (
            sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        )
        near = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f" (did you mean {path.parent / near[0]}?)" if near else ""
        what = "is a folder, not a config file" if path.is_dir() else "no such config file"
        raise ConfigError(f"{path}: {what}{hint}")
    try:
        values = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {_one_line(error)}") from error
    except OSError as error:
        if error.errno is not None:  # the file system's
            raise
        raise ConfigError(f"{path}: must hold 'key: value' lines, not a single value") from error
    if not isinstance(values, DictConfig):
        raise ConfigError(f"{path}: must hold 'key: value' lines, not a list")
    return Layer(str(path), values)


def read_overrides(arguments: Sequence[str]) -> Layer:
    """Read `key=value` words from the command line as a layer."""
    for word in arguments:
        if "=" not in word or word.startswith("-"):
            raise ConfigError(f"command line: '{word}' is neither a known flag nor key=value")
        try:
            OmegaConf.from_dotlist([word])
        except (YAMLError, OmegaConfBaseException, LookupError, ValueError, TypeError) as error:
            raise ConfigError(
                f"command line: '{word}' is not readable: {_one_line(error)}"
            ) from error
    try:
        return Layer("command line", OmegaConf.from_dotlist(list(arguments)))
    except OmegaConfBaseException as error:  # words that are fine alone
        raise ConfigError(f"command line: {_one_line(error)}") from error


def chosen(layers: Sequence[Layer], key: str) -> tuple[Any, str]:
    """What the last layer that has the top-level `key` says, and that layer's name; None if none.

    Raises ConfigError if the value refers to something that is not there.
    """
    for layer in reversed(layers):
        if key in layer.values and not OmegaConf.is_missing(layer.values, key):
            try:
                return OmegaConf.select(layer.values, key), layer.source
            except OmegaConfBaseException as error:
                raise ConfigError(f"{layer.source}: {key}: {_one_line(error)}") from error
    return None, "default"


def load_config(schema: T, layers: Sequence[Layer], renamed: Mapping[str, str] | None = None) -> T:
    """Merge `layers` into `schema` (a dataclass instance holding the defaults) and type the result.

    `renamed` maps keys of other systems to the text that tells what to write here instead.
    Raises ConfigError that lists every unknown key, or the first value of a wrong type.
    """
    config = OmegaConf.structured(schema)
    known = list(_paths(config))
    unknown = [
        f"{layer.source}: {_unknown(path, known, renamed or {})}"
        for layer in layers
        for path in _paths(layer.values)
        if path not in known and _outermost(path, known)
    ]
    unknown += [
        f"{layer.source}: {problem}" for layer in layers for problem in _misplaced(config, layer)
    ]
    if unknown:
        raise ConfigError("\n".join(unknown))
    for layer in layers:
        try:
            config = OmegaConf.merge(config, layer.values)
        except OmegaConfBaseException as error:
            key = f"{error.full_key}: " if error.full_key else ""
            raise ConfigError(f"{layer.source}: {key}{_one_line(error)}") from error
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            sources = ", ".join(layer.source for layer in layers)
            lines = [f"{key}: must be set, by one of: {sources}" for key in missing]
            raise ConfigError("\n".join(lines))
        result = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise ConfigError(f"{error.full_key}: {_one_line(error)}") from error
    assert isinstance(result, type(schema))
    return result


def _misplaced(schema: DictConfig, layer: Layer) -> Iterator[str]:
    """Single values where the schema has sections or lists, and lists where it has sections."""
    for path in _paths(layer.values):
        parent, _, key = path.rpartition(".")
        wanted = OmegaConf.select(schema, parent) if parent else schema
        if not isinstance(wanted, DictConfig) or key not in wanted:
            continue
        held, node = wanted._get_node(key), _node(layer.values, path)
        if not isinstance(node, Node) or node._is_none() or node._is_interpolation():
            continue
        value = OmegaConf.to_container(node) if isinstance(node, Container) else node._value()
        if isinstance(held, DictConfig) and not isinstance(node, DictConfig):
            some = next(map(str, held))
            yield f"{path}: is a section, with keys such as {path}.{some}; got the value {value!r}"
        elif isinstance(held, ListConfig) and not isinstance(node, ListConfig):
            usual = OmegaConf.to_container(held)
            yield f"{path}: must be a list, such as {usual}; got {value!r}"


def _node(values: DictConfig, path: str) -> Any:
    node: Any = values
    for key in path.split("."):
        node = node._get_node(key)
    return node


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML text, keys in schema order."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def leaves(config: Any) -> dict[str, Any]:
    """The values of a configuration that are no sections, by their dotted keys."""
    return dict(_leaves(OmegaConf.structured(config)))


def differences(old: DictConfig, new: DictConfig) -> dict[str, tuple[Any, Any]]:
    """Leaf keys whose values differ between two configurations, with both values."""
    left, right = dict(_leaves(old)), dict(_leaves(new))
    keys = sorted(left.keys() | right.keys())
    pairs = {key: (left.get(key), right.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _paths(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in map(str, node):
        path = f"{prefix}{key}"
        yield path
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            yield from _paths(child, f"{path}.")


def _leaves(node: DictConfig) -> Iterator[tuple[str, Any]]:
    for path in _paths(node):
        value = OmegaConf.select(node, path)
        if not isinstance(value, DictConfig):
            yield path, OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _outermost(path: str, known: Sequence[str]) -> bool:
    """Whether the unknown `path` lies in no other unknown one, so that it is reported once."""
    parent = path.rpartition(".")[0]
    return not parent or parent in known


def _unknown(path: str, known: Sequence[str], renamed: Mapping[str, str]) -> str:
    if path in renamed:
        return f"unknown key '{path}': write {renamed[path]}"
    near = nearest(path, known)
    hint = f" (did you mean '{near}'?)" if near else f"; allowed here: {_siblings(path, known)}"
    return f"unknown key '{path}'{hint}"


def nearest(path: str, known: Sequence[str]) -> str | None:
    """The known key that `path` most likely means: by its whole path, else by its last word."""
    by_path = difflib.get_close_matches(path, known, n=1, cutoff=0.75)
    if by_path:
        return by_path[0]
    word = path.rpartition(".")[2]
    last = {key.rpartition(".")[2]: key for key in reversed(known)}
    by_word = difflib.get_close_matches(word, list(last), n=1, cutoff=0.7)
    return last[by_word[0]] if by_word else None


def _siblings(path: str, known: Sequence[str]) -> str:
    parent = path.rpartition(".")[0]
    return ", ".join(key for key in known if key.rpartition(".")[0] == parent)


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(line for line in lines if not line.startswith(OMITTED))
