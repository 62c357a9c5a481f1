"""A tokenizer is read, never run: folders that bring code of their own."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from model.encoders.text import load_tokenizer
from scripts.make_tiny_world import NAME
from tests.sources import sources
from utils.weights import WeightsError

EVIL = """
from pathlib import Path
from transformers import PretrainedConfig, PreTrainedTokenizerFast

Path({mark!r}).touch()


class EvilConfig(PretrainedConfig):
    model_type = "evil"


class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""
CODE = {"AutoTokenizer": [None, "evil.EvilTokenizer"], "AutoConfig": "evil.EvilConfig"}


def planted(folder: Path, tiny_root: Path, changes: dict[str, dict[str, Any]]) -> tuple[Path, Path]:
    """A tokenizer's folder with code, and what that code would leave. changes: of JSON files."""
    source = tiny_root / "wan_models" / NAME / "google" / "umt5-xxl"
    made, mark = Path(shutil.copytree(source, folder / "tokenizer")), folder / "ran"
    (made / "evil.py").write_text(EVIL.format(mark=str(mark)), encoding="utf-8")
    for name, values in changes.items():
        path = made / name
        there = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        path.write_text(json.dumps(there | values), encoding="utf-8")
    return made, mark


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_config.json": {"tokenizer_class": "EvilTokenizer", "auto_map": CODE}},
        {"tokenizer_config.json": {"auto_map": CODE}},
        {"config.json": {"model_type": "evil", "auto_map": CODE}},
        {
            "tokenizer_config.json": {"tokenizer_class": None, "auto_map": CODE},
            "config.json": {"model_type": "evil", "auto_map": CODE},
        },
    ],
)
def test_code_beside_a_tokenizer_is_not_run_and_nobody_is_asked(
    changes: dict[str, dict[str, Any]],
    tiny_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, mark = planted(tmp_path, tiny_root, changes)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    try:
        load_tokenizer(folder)  # the class that it is of without that code, or a line
    except WeightsError as error:
        assert str(error).startswith(f"{folder}: not a readable tokenizer: ")
    assert not mark.exists()


def test_the_planted_code_is_what_would_run(tiny_root: Path, tmp_path: Path) -> None:
    """Otherwise the tests above could not fail."""
    from transformers import AutoTokenizer

    config = {"tokenizer_class": "EvilTokenizer", "auto_map": CODE}
    folder, mark = planted(tmp_path, tiny_root, {"tokenizer_config.json": config})
    AutoTokenizer.from_pretrained(str(folder), trust_remote_code=True)
    assert mark.exists()


def test_no_file_of_ours_lets_a_folder_run_code() -> None:
    for source in sources():
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.Call):
                continue
            words = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert words.get("trust_remote_code", "False") == "False", source.module
            assert words.get("weights_only", "True") == "True", source.module
            if ast.unparse(node.func).endswith(".from_pretrained"):
                assert words.get("trust_remote_code") == "False", source.module
