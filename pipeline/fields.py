"""Fields of a request: their kinds, how JSON and command-line words become values, their limits."""

from __future__ import annotations

import argparse
import difflib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from utils.errors import UserError

KEY = "option"  # of a dataclass field's metadata
MOST = 10**9  # of pixels or frames; memory ends before
Json = dict[str, Any]


class RequestError(UserError):
    """A request that nobody can serve; the message holds one problem per line."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class Kind(ABC):
    """The values that a field may have, whatever the model."""

    @abstractmethod
    def parse(self, value: object) -> Any:
        """A JSON value as what the request holds. Raises UserError: "must be ..., got ..."."""

    @abstractmethod
    def schema(self) -> Json:
        """The same in the words of JSON Schema."""

    def word(self, text: str) -> object:
        """A word of the command line as JSON would have it; what it cannot be stays a text."""
        return text


def shown(value: object) -> str:
    """A value for a message: short, and never more than one line."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


@dataclass(frozen=True)
class Text(Kind):
    """A text, stripped of white space around it."""

    most: int  # characters
    empty: bool = False  # whether it may be

    def parse(self, value: object) -> str:
        """See Kind."""
        if not isinstance(value, str):
            raise UserError(f"must be a text, got {shown(value)}")
        if not self.empty and not value.strip():
            raise UserError("must be a text that is not empty")
        if len(value) > self.most:
            raise UserError(f"at most {self.most} characters, this one has {len(value)}")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can write halves of characters
            raise UserError(f"has half a character at {error.start}: {value!a:.40}") from error
        return value.strip()

    def schema(self) -> Json:
        """See Kind."""
        return {"type": "string", "minLength": 0 if self.empty else 1, "maxLength": self.most}


@dataclass(frozen=True)
class Whole(Kind):
    """A whole number."""

    least: int
    most: int

    def parse(self, value: object) -> int:
        """See Kind."""
        if type(value) is not int or not self.least <= value <= self.most:  # True is an int, too
            limits = f"from {self.least} to {self.most}"
            raise UserError(f"must be a whole number {limits}, got {shown(value)}")
        return value

    def schema(self) -> Json:
        """See Kind."""
        return {"type": "integer", "minimum": self.least, "maximum": self.most}

    def word(self, text: str) -> object:
        """See Kind."""
        return int(text) if re.fullmatch(r"[+-]?[0-9]{1,30}", text) else text


@dataclass(frozen=True)
class Number(Kind):
    """A finite number."""

    least: float
    most: float

    def parse(self, value: object) -> float:
        """See Kind."""
        number = value if type(value) is int or type(value) is float else math.nan
        if self.least <= number <= self.most:
            return float(number)
        limits = f"from {self.least:g} to {self.most:g}"
        raise UserError(f"must be a number {limits}, got {shown(value)}")

    def schema(self) -> Json:
        """See Kind."""
        return {"type": "number", "minimum": self.least, "maximum": self.most}

    def word(self, text: str) -> object:
        """See Kind."""
        try:
            number = float(text)
        except ValueError:
            return text
        return number if math.isfinite(number) else text


@dataclass(frozen=True)
class PixelSize(Kind):
    """Height and width in pixels: two whole numbers, on the command line HEIGHTxWIDTH."""

    def parse(self, value: object) -> tuple[int, int]:
        """See Kind."""
        sides = value if isinstance(value, list) else []
        if len(sides) != 2 or not all(type(s) is int and 0 < s <= MOST for s in sides):
            raise UserError(
                f"must be height and width in pixels, as [480, 832] or 480x832, got {shown(value)}"
            )
        return sides[0], sides[1]

    def schema(self) -> Json:
        """See Kind."""
        side = {"type": "integer", "minimum": 1, "maximum": MOST}
        return {"type": "array", "items": side, "minItems": 2, "maxItems": 2}

    def word(self, text: str) -> object:
        """See Kind."""
        found = re.fullmatch(r"([0-9]{1,30})[xX*]([0-9]{1,30})", text.strip())
        return [int(found[1]), int(found[2])] if found else text


def _taken(_: Any) -> None:
    """Every model takes it."""


@dataclass(frozen=True)
class Option:
    """A field that users may set: what it means, and what a model says to it.

    The functions are given what the model can do, and the last one a value before that.
    """

    kind: Kind
    help: str
    refused: Callable[[Any], str | None] = _taken  # why this model does not take it
    usual: Callable[[Any], object] = _taken  # what None stands for, as JSON has it
    problem: Callable[[Any, Any], str | None] = lambda _value, _model: None


def asked(
    kind: Kind,
    text: str,
    *,
    default: Any = MISSING,
    refused: Callable[[Any], str | None] = _taken,
    usual: Callable[[Any], object] = _taken,
    problem: Callable[[Any, Any], str | None] = lambda _value, _model: None,
) -> Any:
    """A dataclass field that users may set: this one line is all that a new field takes."""
    option = Option(kind, text, refused, usual, problem)
    return field(default=default, metadata={KEY: option})


def options(cls: type) -> dict[str, Option]:
    """The fields of a request that users may set, by name."""
    return {f.name: f.metadata[KEY] for f in fields(cls) if KEY in f.metadata}


def required(cls: type) -> list[str]:
    """The fields that must be set."""
    return [f.name for f in fields(cls) if KEY in f.metadata and f.default is MISSING]


def unknown(cls: type, names: Iterable[str]) -> Iterator[str]:
    """What is said of names that are no fields, with the nearest that is one."""
    known = list(options(cls))
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}"
            yield f"unknown field {shown(name)} ({hint})"


def parse(
    cls: type, body: Mapping[str, object], model: Any, name_of: Callable[[str], str]
) -> tuple[dict[str, Any], list[str]]:
    """The values of a request's fields, and all that is wrong with them one by one.

    model: what it can do, as options know it. name_of: a field as messages name it. Null is the
    field's default.
    """
    values, problems = {}, list(unknown(cls, body))
    for name, option in options(cls).items():
        if body.get(name) is None and (name not in required(cls)):
            continue
        if name not in body:
            problems.append(f"{name_of(name)}: is missing; it says {option.help}")
            continue
        try:
            values[name] = option.kind.parse(body[name])
        except UserError as error:
            problems.append(f"{name_of(name)}: {error}")
            continue
        fault = option.refused(model) or option.problem(values[name], model)
        if fault:
            problems.append(f"{name_of(name)}: {fault}")
    return values, problems


def schema(cls: type, model: Any) -> Json:
    """JSON Schema of what a model takes, with its defaults: for pages and other programs."""
    properties = {}
    for name, option in options(cls).items():
        if option.refused(model) is None:
            usual = option.usual(model)
            default = {} if usual is None else {"default": usual}
            properties[name] = {**option.kind.schema(), "description": option.help, **default}
    return {
        "type": "object",
        "properties": properties,
        "required": required(cls),
        "additionalProperties": False,
    }


def add_flags(parser: argparse.ArgumentParser, cls: type, names: Iterable[str]) -> None:
    """Flags for some fields of a request; their words stay texts until `from_words`."""
    known = options(cls)
    for name in names:
        sized = "HEIGHTxWIDTH" if isinstance(known[name].kind, PixelSize) else None
        parser.add_argument(f"--{name}", metavar=sized, help=known[name].help)


def from_words(cls: type, args: argparse.Namespace) -> dict[str, object]:
    """The flags that were given, as JSON would have them."""
    words = {name: vars(args).get(name) for name in options(cls)}
    known = options(cls)
    return {k: known[k].kind.word(word) for k, word in words.items() if word is not None}
