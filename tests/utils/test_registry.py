"""Looking classes up by the name of their file."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from utils.registry import member_of

FILES = {
    "__init__": "",
    "base": (
        "from abc import ABC, abstractmethod\n"
        "class Animal(ABC):\n"
        "    @abstractmethod\n"
        "    def speak(self): ...\n"
    ),
    "dog": "from zoo.base import Animal\nclass Dog(Animal):\n    def speak(self): return 'wau'\n",
    "puppy": (
        "from zoo.dog import Dog\nclass Puppy(Dog):\n    def speak(self): return 'wi'\n"
        "class Basket: ...\n"
    ),
    "twins": ("from zoo.dog import Dog\nclass Castor(Dog): ...\nclass Pollux(Dog): ...\n"),
    "stone": "class Stone: ...\n",
}


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    folder = tmp_path / "zoo"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield importlib.import_module("zoo")
    for name in [name for name in sys.modules if name == "zoo" or name.startswith("zoo.")]:
        del sys.modules[name]


def animal() -> type:
    return importlib.import_module("zoo.base").Animal


def error_of(zoo: ModuleType, name: str) -> str:
    with pytest.raises(ValueError) as caught:
        member_of(zoo, name, animal(), key="pet")
    return str(caught.value)


def test_a_class_is_found_by_the_name_of_its_file(zoo: ModuleType) -> None:
    assert member_of(zoo, "dog", animal(), key="pet").__name__ == "Dog"


def test_a_class_that_a_file_merely_imports_is_not_its_member(zoo: ModuleType) -> None:
    assert member_of(zoo, "puppy", animal(), key="pet").__name__ == "Puppy"


def test_an_unknown_name_quotes_the_key_the_choices_and_the_nearest(zoo: ModuleType) -> None:
    assert error_of(zoo, "pupy") == (
        "pet: 'pupy' is unknown, choose one of dog, puppy; did you mean 'puppy'?"
    )


@pytest.mark.parametrize("name", ["base", "stone", "twins", "os", "dog.Dog", "../zoo/dog", ""])
def test_what_holds_no_single_concrete_member_is_no_choice(zoo: ModuleType, name: str) -> None:
    assert error_of(zoo, name).startswith(f"pet: '{name}' is unknown, choose one of dog, puppy")
