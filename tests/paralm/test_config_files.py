"""Configuration files: layers, overrides, provenance, round trips, and one line for everything that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from paralm import resources
from paralm.config import Config
from paralm.config_errors import known_keys, nearest_key
from paralm.config_files import (
    Origin,
    annotate,
    diff,
    dump_yaml,
    flatten,
    frozen_differences,
    load_config,
)
from paralm.config_yaml import inline, parse, write
from paralm.errors import ConfigError
from tests.paralm.damaged_configs import DAMAGED, Damaged


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def load(*args: Any) -> Config:
    return load_config(*args, build=False).config


# -- layers --------------------------------------------------------------------------------------------------


def test_later_layers_win_and_each_leaf_knows_where_it_came_from(folder: Path) -> None:
    put(folder, "parts/base.yaml", "training:\n  max_steps: 10\n  seq_len: 32\nrun:\n  seed: 3\n")
    put(folder, "run.yaml", "include: parts/base.yaml\ntraining:\n  max_steps: 20\n")
    config, origin = load_config("run.yaml", ["training.micro_batch_size=2", "run.seed=4"])
    training = config.training
    assert (training.max_steps, training.seq_len, training.micro_batch_size, config.run.seed) == (20, 32, 2, 4)
    assert str(origin["training.max_steps"]) == "run.yaml:3"
    assert str(origin["training.seq_len"]) == "parts/base.yaml:3"
    assert str(origin["run.seed"]) == "override 'run.seed=4'"
    assert origin["training.precision"] == Origin()
    assert set(origin) == set(flatten(config))


def test_includes_are_relative_to_their_file_and_nest(folder: Path) -> None:
    put(folder, "a/b/deep.yaml", "model: {d_model: 8}\n")
    put(folder, "a/mid.yaml", "include: b/deep.yaml\nmodel: {n_layers: 3}\n")
    put(folder, "top.yaml", "include: [a/mid.yaml, a/b/deep.yaml]\n")  # one file twice is no circle
    config = load("top.yaml")
    assert (config.model.d_model, config.model.n_layers) == (8, 3)


def test_includes_find_presets_by_name(folder: Path) -> None:
    put(folder, "run.yaml", "include: [quickstart, model/paralstm_10m]\n")
    config = load("run.yaml")
    assert config.run.name == "quickstart"
    assert config.model.mixer["name"] == "paralstm"


def test_longer_circles_are_refused_with_their_members(folder: Path) -> None:
    put(folder, "a.yaml", "include: b.yaml\n")
    put(folder, "b.yaml", "run: {}\ninclude: a.yaml\n")
    with pytest.raises(ConfigError, match=r"b.yaml:2: include: goes round in a circle: a.yaml → b.yaml → a.yaml"):
        load("a.yaml")


def test_an_empty_section_does_not_wipe_an_included_one(folder: Path) -> None:
    put(folder, "base.yaml", "model: {d_model: 8}\n")
    put(folder, "run.yaml", "include: base.yaml\nmodel:\n  # d_model: 512\n")
    assert load("run.yaml").model.d_model == 8


def test_another_mixer_replaces_the_whole_mixer(folder: Path) -> None:
    put(folder, "run.yaml", "model: {mixer: {name: paragru, d_conv: 2}}\n")
    assert load("run.yaml", ["model.mixer.name=attention"]).model.mixer == {"name": "attention"}
    assert load("run.yaml", ["model.mixer.d_conv=3"]).model.mixer == {"name": "paragru", "d_conv": 3}
    both = {"name": "attention", "n_heads": 2}
    assert load("run.yaml", ["model.mixer.n_heads=2", "model.mixer.name=attention"]).model.mixer == both
    assert load("run.yaml", ["model.mixer={name: attention, n_heads: 2}"]).model.mixer == both


def test_overrides_take_any_yaml_and_the_last_wins(folder: Path) -> None:
    put(folder, "run.yaml", "run: {}\n")
    config = load(
        "run.yaml",
        [
            "eval.prompts=[a, 'b c']",
            "data.source={kind: text, paths: [x=1.txt]}",
            "run.seed=1",
            "run.seed=2",
            "data.dir=~/corpus",
        ],
    )
    assert config.eval.prompts == ["a", "b c"]
    assert config.data.source.paths == ["x=1.txt"]
    assert config.run.seed == 2
    assert config.data.dir == Path.home() / "corpus"


def test_mixer_defaults_are_filled_in(folder: Path) -> None:
    put(folder, "run.yaml", "model: {mixer: {name: paragru}}\n")
    config, origin = load_config("run.yaml")
    assert config.model.mixer["name"] == "paragru"
    assert len(config.model.mixer) > 1, "the mixer's own keys are written out"
    key = f"model.mixer.{list(config.model.mixer)[1]}"
    assert origin[key] == Origin()


def test_a_module_of_the_users_own_is_loaded_before_the_mixer_is_checked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paralm_kernels import cell as cells

    monkeypatch.setattr(cells, "_registry", dict(cells._registry))  # forgotten with the test
    cell = (
        "import torch\nimport paralm_kernels\n\n\n"
        "class Leak(paralm_kernels.Cell):\n"
        "    name, state, inputs, params = 'leak_of_config_test', ('h',), ('x',), ('a',)\n\n"
        "    def step(self, state, inputs, params):\n"
        "        return (torch.tanh(params[0] * state[0] + inputs[0]),)\n\n\n"
        "paralm_kernels.register(Leak())\n"
    )
    put(folder, "mine/cell.py", cell)
    put(folder, "mine/run.yaml", "imports: [cell.py]\nmodel: {mixer: {name: leak_of_config_test}}\n")
    config = load_config("mine/run.yaml").config
    assert config.imports == [str(folder / "mine/cell.py")], "relative to the file that names it, made absolute"
    assert config.model.mixer["name"] == "leak_of_config_test"
    assert load_config("mine/run.yaml").config == config, "a module is loaded once, however often it is named"


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("def (:\n", "line 1: SyntaxError"),
        ("x = 1\ny = z\n", "line 2: NameError: name 'z' is not defined"),
        ("import json\n\njson.loads('{')\n", "line 3: JSONDecodeError"),
        ("import no_such_package_\n", "line 1: ModuleNotFoundError: No module named 'no_such_package_'"),
        ("import sys\nsys.exit()\n", "line 2: SystemExit"),
    ],
)
def test_a_fault_in_a_users_module_is_named_with_its_line(folder: Path, code: str, fault: str) -> None:
    put(folder, "cell.py", code)
    put(folder, "run.yaml", "imports: [cell.py]\n")
    with pytest.raises(ConfigError) as caught:
        load_config("run.yaml")
    assert str(caught.value).startswith(f"imports: {folder / 'cell.py'}, {fault}")
    assert "\n" not in str(caught.value)


# -- the dialect ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("1_000_000", 1_000_000),
        ("0x10", 16),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("no", "no"),
        ("on", "on"),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("~", None),
        ("", None),
        ("True", True),
        ("e5", "e5"),
        ("_1", "_1"),
    ],
)
def test_plain_scalars_are_yaml_1_2(text: str, value: Any) -> None:
    found, _ = parse(f"k: {text}\n", "x")
    assert found == {"k": value}
    assert type(found["k"]) is type(value)


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
_AMBIGUOUS = st.sampled_from(
    ["1e-3", "no", "010", "1:30", "2024-01-01", "null", "", "~", "=", "<<", "0o7", "a\nb", "é"]
)
_VALUES = st.recursive(
    _SCALARS | _AMBIGUOUS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | _AMBIGUOUS, inner, max_size=3),
    max_leaves=8,
)


@given(_VALUES)
def test_what_is_written_is_read_back(value: Any) -> None:
    """By this reader, and by any reader of YAML 1.1; whole files and single lines."""
    for text in (write({"k": value}), f"k: {inline(value)}\n"):
        assert parse(text, "x")[0] == {"k": value}
        assert yaml.safe_load(text) == {"k": value}
    assert "\n" not in inline(value)


# -- the whole configuration ---------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", sorted(resources.presets()))
def test_every_preset_is_valid_and_survives_its_own_output(preset: str, folder: Path) -> None:
    loaded = load_config(preset)
    put(folder, "dumped.yaml", dump_yaml(loaded.config))
    put(folder, "shown.yaml", annotate(loaded))
    assert load_config("dumped.yaml").config == loaded.config
    assert load_config("shown.yaml").config == loaded.config
    assert resources.describe(resources.presets()[preset]), "its first line says what it is for"


def test_config_show_says_where_each_value_came_from(folder: Path) -> None:
    put(folder, "run.yaml", "training:\n  max_steps: 5\n")
    lines = annotate(load_config("run.yaml", ["run.seed=2"])).splitlines()
    assert any(line.split() == ["max_steps:", "5", "#", "run.yaml:2"] for line in lines)
    assert any(line.endswith("# override 'run.seed=2'") for line in lines)
    assert any(line.split() == ["seq_len:", "256", "#", "default"] for line in lines)


def changed(**overrides: Any) -> Config:
    config = Config()
    for key, value in overrides.items():
        section, _, name = key.partition("__")
        setattr(getattr(config, section), name, value)
    return config


def test_diff_names_each_key_with_both_values() -> None:
    other = changed(run__seed=4, model__mixer={"name": "paragru", "d_conv": 2})
    assert diff(Config(), other) == [("run.seed", 0, 4), ("model.mixer.d_conv", None, 2)]
    assert diff(other, Config()) == [("run.seed", 4, 0), ("model.mixer.d_conv", 2, None)]
    assert diff(other, other.model_copy(deep=True)) == []


FROZEN: list[tuple[str, Any]] = [
    ("run__seed", 1),
    ("data__order", "lanes"),
    ("data__held_out_fraction", 0.1),
    ("model__d_model", 8),
    ("model__mixer", {"name": "paralstm"}),
    ("training__seq_len", 8),
    ("training__global_batch_size", 8),
    ("training__precision", "bf16"),
    ("training__max_steps", 8),
    ("training__init_from", "other"),
    ("optimizer__lr", 1.0),
    ("optimizer__betas", (0.9, 0.99)),
]
FREE: list[tuple[str, Any]] = [
    ("run__name", "b"),
    ("run__root", Path("elsewhere")),
    ("data__verify", "size"),
    ("training__micro_batch_size", 2),
    ("training__validate_every", 2),
    ("training__hang_timeout", 2.0),
    ("checkpoint__every", 7),
    ("parallel__zero_stage", 2),
    ("eval__rows", 3),
]


@pytest.mark.parametrize(("key", "value"), FROZEN)
def test_keys_that_make_a_run_cannot_change(key: str, value: Any) -> None:
    differences = frozen_differences(Config(), changed(**{key: value}))
    assert [d[0].split(".")[:2] for d in differences] == [key.split("__")]


@pytest.mark.parametrize(("key", "value"), FREE)
def test_keys_that_only_say_how_and_where_may_change(key: str, value: Any) -> None:
    assert frozen_differences(Config(), changed(**{key: value})) == []


# -- what is wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [d for d in DAMAGED if "launcher" not in d.name], ids=lambda d: d.name)
def test_a_damaged_configuration_is_refused_in_one_line(case: Damaged, folder: Path) -> None:
    text = case.text if isinstance(case.text, bytes) else case.text.encode()
    (folder / "run.yaml").write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        load_config("run.yaml", list(case.overrides))
    message = str(caught.value)
    assert "\n" not in message
    for piece in case.names:
        assert piece in message
    assert [p.name for p in folder.iterdir()] == ["run.yaml"]


def test_several_mistakes_are_counted_and_the_first_line_comes_first(folder: Path) -> None:
    put(folder, "run.yaml", "training:\n  max_steps: x\nmodel:\n  d_model: y\n")
    with pytest.raises(ConfigError, match=r"^run.yaml:2: training.max_steps: .*got x \(and 2 more\)$"):
        load("run.yaml", ["run.seed=z"])


def test_a_mistake_in_an_included_file_is_placed_there(folder: Path) -> None:
    put(folder, "parts/base.yaml", "\nmodel:\n  d_model: 0\n")
    put(folder, "run.yaml", "include: parts/base.yaml\nmodel: {n_layers: 2}\n")
    with pytest.raises(ConfigError, match=r"^parts/base.yaml:3: model.d_model: "):
        load("run.yaml")


@pytest.mark.parametrize(
    ("given_name", "nearest"),
    [("quikstart", "quickstart"), ("model/paragru_10", "model/paragru_10m"), ("rum.yaml", "run.yaml")],
)
def test_a_missing_file_names_the_nearest(folder: Path, given_name: str, nearest: str) -> None:
    put(folder, "run.yaml", "run: {}\n")
    with pytest.raises(ConfigError, match=rf"^{given_name}: no such file or preset; nearest: {nearest}$"):
        load(given_name)


def test_a_folder_is_no_configuration(folder: Path) -> None:
    put(folder, "runs/a/config.yaml", "run: {}\n")
    with pytest.raises(ConfigError, match=r"runs/a: is a folder.*; give runs/a/config.yaml"):
        load("runs/a")


def test_every_misspelt_key_of_the_schema_leads_back_to_it() -> None:
    """A letter dropped from the middle of any key: the nearest key is that key."""
    for key in known_keys():
        *above, name = key.replace("NAME", "mine").split(".")
        if len(name) < 6:
            continue
        wrong = name[:2] + name[3:]
        near = nearest_key((*above, wrong))
        assert near is not None
        assert near.rsplit(".", 1)[-1] == name, f"{key} without a letter leads to {near}"
