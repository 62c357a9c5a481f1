"""Configuration layers: precedence, types, and messages that name source, key and remedy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from omegaconf import MISSING, OmegaConf

from utils.config import (
    ConfigError,
    Layer,
    chosen,
    differences,
    load_config,
    read_overrides,
    read_yaml,
    to_yaml,
)


@dataclass(frozen=True)
class Optimizer:
    lr: float = MISSING
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])


@dataclass(frozen=True)
class Root:
    steps: int = 10
    mode: Literal["fast", "slow"] = "fast"
    note: str | None = None
    generator: Optimizer = field(default_factory=lambda: Optimizer(lr=0.1))
    critic: Optimizer = field(default_factory=lambda: Optimizer(lr=0.2))


def layer(text: str, source: str = "run.yaml") -> Layer:
    return Layer(source, OmegaConf.create(text))


def error_of(*layers: Layer, schema: Root | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(schema or Root(), layers, {"max_iters": "steps", "real": "teacher.model"})
    return str(caught.value)


def test_without_layers_the_defaults_stand() -> None:
    assert load_config(Root(), []) == Root()


def test_a_later_layer_wins_over_an_earlier_one() -> None:
    layers = [layer("{steps: 1, note: file}"), read_overrides(["steps=2"])]
    assert load_config(Root(), layers) == Root(steps=2, note="file")


def test_a_layer_changes_only_the_keys_that_it_names() -> None:
    result = load_config(Root(), [layer("{generator: {lr: 3.0}}")])
    assert result.generator == Optimizer(lr=3.0, betas=[0.9, 0.999])


def test_a_list_is_replaced_and_not_extended() -> None:
    result = load_config(Root(), [layer("{critic: {betas: [0.0, 0.5]}}")])
    assert result.critic.betas == [0.0, 0.5]


def test_overrides_reach_nested_keys() -> None:
    assert load_config(Root(), [read_overrides(["critic.lr=7"])]).critic.lr == 7.0


def test_unknown_key_names_its_source_and_the_nearest_key() -> None:
    assert error_of(layer("{stesp: 1}")) == (
        "run.yaml: unknown key 'stesp' (did you mean 'steps'?)"
    )


def test_unknown_nested_key_is_named_by_its_whole_path() -> None:
    assert error_of(read_overrides(["generator.beta=1"])) == (
        "command line: unknown key 'generator.beta' (did you mean 'generator.betas'?)"
    )


def test_a_key_at_the_wrong_level_is_found_elsewhere_in_the_tree() -> None:
    assert error_of(layer("{lr: 1.0}")) == (
        "run.yaml: unknown key 'lr' (did you mean 'generator.lr'?)"
    )


def test_a_key_like_no_other_gets_the_list_of_its_siblings() -> None:
    assert error_of(layer("{critic: {zzzz: 1}}")) == (
        "run.yaml: unknown key 'critic.zzzz'; allowed here: critic.lr, critic.betas"
    )


def test_a_renamed_key_is_answered_with_its_new_name() -> None:
    assert error_of(layer("{max_iters: 1}")) == "run.yaml: unknown key 'max_iters': write steps"


def test_an_unknown_section_is_reported_once_and_not_per_key() -> None:
    assert error_of(layer("{real: {a: 1, b: 2}}")) == (
        "run.yaml: unknown key 'real': write teacher.model"
    )


def test_all_unknown_keys_are_reported_together() -> None:
    found = error_of(layer("{stesp: 1, nota: 2}"), read_overrides(["mood=fast"]))
    assert found.splitlines() == [
        "run.yaml: unknown key 'stesp' (did you mean 'steps'?)",
        "run.yaml: unknown key 'nota' (did you mean 'note'?)",
        "command line: unknown key 'mood' (did you mean 'mode'?)",
    ]


def test_a_value_of_the_wrong_type_is_quoted_with_its_key() -> None:
    assert error_of(read_overrides(["steps=many"])) == (
        "command line: steps: Value 'many' of type 'str' could not be converted to Integer"
    )


def test_a_fraction_is_no_integer() -> None:
    assert error_of(layer("{steps: 1.5}")) == (
        "run.yaml: steps: Value '1.5' of type 'float' could not be converted to Integer"
    )


def test_a_choice_outside_the_allowed_ones_lists_them() -> None:
    assert error_of(layer("{mode: fats}")) == (
        "run.yaml: mode: Invalid value 'fats', expected one of ['fast', 'slow']"
    )


def test_null_is_refused_where_a_value_is_needed() -> None:
    assert error_of(layer("{steps: null}")) == (
        "run.yaml: steps: Incompatible value 'None' for field of type 'int'"
    )


def test_missing_values_are_listed_with_the_sources_that_could_set_them() -> None:
    schema = Root(generator=Optimizer(), critic=Optimizer())
    found = error_of(layer("{}", "default.yaml"), read_overrides([]), schema=schema)
    assert found.splitlines() == [
        "critic.lr: must be set, by one of: default.yaml, command line",
        "generator.lr: must be set, by one of: default.yaml, command line",
    ]


def test_an_interpolation_may_refer_to_another_key() -> None:
    assert load_config(Root(), [layer("{note: '${mode}'}")]).note == "fast"


def test_an_interpolation_that_leads_nowhere_names_its_key() -> None:
    assert error_of(layer("{steps: '${nowhere}'}")) == (
        "steps: Interpolation key 'nowhere' not found"
    )


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "dmd.yaml").write_text("steps: 1\n")
    with pytest.raises(ConfigError) as caught:
        read_yaml(tmp_path / "dmdd.yaml")
    assert str(caught.value) == (
        f"{tmp_path}/dmdd.yaml: no such config file (did you mean {tmp_path}/dmd.yaml?)"
    )


def test_a_missing_file_in_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_yaml(tmp_path / "absent" / "x.yaml")
    assert str(caught.value) == f"{tmp_path}/absent/x.yaml: no such config file"


def test_broken_yaml_is_told_by_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("steps: [1,\n mode")
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: not readable as YAML: while parsing a flow sequence; ")
    assert "line 1, column 8" in message
    assert "\n" not in message


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("steps: 1\nsteps: 2\n")
    with pytest.raises(ConfigError, match="found duplicate key"):
        read_yaml(path)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"binary.yaml: not readable as YAML: 'utf-8' codec"):
        read_yaml(path)


def test_a_list_at_the_top_of_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    path.write_text("- steps\n")
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert str(caught.value) == f"{path}: must hold 'key: value' lines, not a list"


@pytest.mark.parametrize("word", ["steps", "--steps=3", "-x"])
def test_a_word_that_is_no_assignment_is_refused(word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_overrides([word])
    assert str(caught.value) == f"command line: '{word}' is neither a known flag nor key=value"


def test_yaml_text_of_a_configuration_reads_back_to_the_same_configuration() -> None:
    config = Root(steps=3, note="x", generator=Optimizer(lr=1e-5))
    assert load_config(Root(), [layer(to_yaml(config))]) == config


def test_differences_lists_changed_leaves_with_both_values() -> None:
    old, new = (OmegaConf.create(to_yaml(c)) for c in (Root(), Root(steps=3, note="x")))
    assert differences(old, new) == {"note": (None, "x"), "steps": (10, 3)}


def test_differences_sees_a_changed_list() -> None:
    old, new = OmegaConf.create("{a: {b: [1]}}"), OmegaConf.create("{a: {b: [1, 2]}}")
    assert differences(old, new) == {"a.b": ([1], [1, 2])}


# ---- files and values of the wrong kind


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("5", "must hold 'key: value' lines, not a single value"),
        ("true", "must hold 'key: value' lines, not a single value"),
        ("- a", "must hold 'key: value' lines, not a list"),
        ("steps: ${nope", "not readable as YAML: no viable alternative at input '${nope'"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert str(caught.value) == f"{path}: {problem}"


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder, not a config file"):
        read_yaml(tmp_path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "{generator: 5}",
            "generator: is a section, with keys such as generator.lr; got the value 5",
        ),
        (
            "{generator: [1]}",
            "generator: is a section, with keys such as generator.lr; got the value [1]",
        ),
        (
            "{generator: {betas: abc}}",
            "generator.betas: must be a list, such as [0.9, 0.999]; got 'abc'",
        ),
    ],
)
def test_a_value_in_the_place_of_a_section_or_a_list_is_told_with_what_belongs_there(
    text: str, problem: str
) -> None:
    assert error_of(layer(text)) == f"run.yaml: {problem}"


def test_a_list_may_come_from_another_key() -> None:
    result = load_config(Root(), [layer("{generator: {betas: '${critic.betas}'}}")])
    assert result.generator.betas == [0.9, 0.999]


def test_a_word_that_is_no_setting_is_quoted() -> None:
    with pytest.raises(ConfigError, match=r"command line: 'steps=\[' is not readable: "):
        read_overrides(["steps=["])


def test_the_last_layer_that_has_a_key_chooses() -> None:
    layers = [layer("{mode: fast}", "a"), layer("{mode: slow}", "b"), layer("{steps: 1}", "c")]
    assert chosen(layers, "mode") == ("slow", "b")
    assert chosen([*layers, layer("{mode: null}", "d")], "mode") == (None, "d")
    assert chosen(layers, "note") == (None, "default")


def test_a_choice_that_leads_nowhere_is_refused() -> None:
    with pytest.raises(ConfigError, match="mode: Interpolation key 'nope' not found"):
        chosen([layer("{mode: '${nope}'}")], "mode")
