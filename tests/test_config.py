"""Settings: what is written is read, what is wrong is named, and a recipe follows from the settings it depends on."""

from dataclasses import replace
from pathlib import Path

import pytest

from secateur.config import Config
from secateur.config_file import load_config, save_config
from secateur.files import InputError
from secateur.options import Prune, parse


def config(**settings):
    return Config(**{"model": "org/model", "sparsity": 0.3, "data": "text.txt"} | settings)


def complaint(call):
    with pytest.raises(InputError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "config.yaml"


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"recipe": "paper"}, {"shape": "uniform", "steps": 7, "lr": 0.1, "eval_data": "ü.txt"}]
)
def test_resolved_settings_survive_writing_and_reading(file, settings):
    resolved = config(**settings).resolved()
    save_config(resolved, file)
    assert load_config(file) == resolved
    assert load_config(file).resolved() == resolved


def test_the_output_folder_is_not_written_so_that_a_file_repeats_a_run_elsewhere(file):
    save_config(config(out=Path("runs/a")).resolved(), file)
    assert load_config(file).out is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("model: m\nsparsity: 0.2\nstep: 5\n", "step: "),
        ("model: m\nsparsity: 0.2\nsteps: many\n", "steps: "),
        ("model: m\nsparsity: 0.2\nrecipe: best\n", "recipe: "),
        ("model: m\n", "sparsity: "),
        ("model: m\nsparsity: 2\n", "--sparsity must lie between 0 and 1"),
        ("model: m\nsparsity: 0.2\nlearning: {name: auto}\n", "learning.lr: "),
        ("[1, 2]", "settings: "),
        ("", "settings: "),
        ("a: [", "not readable YAML"),
        ("model: \x00", "not readable YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name_and_the_field(file, text, reason):
    file.write_text(text)
    message = complaint(lambda: load_config(file))
    assert reason in message and (str(file) in message or "--sparsity" in message)


def test_a_file_that_is_not_text_is_refused(file):
    file.write_bytes(b"\xff\xfe\x00")
    assert str(file) in complaint(lambda: load_config(file))


def test_a_missing_file_is_named(file):
    assert str(file) in complaint(lambda: load_config(file))


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sparsity", 0.0), ("sparsity", 1.0), ("sparsity", 1.5), ("sparsity", -0.1), ("sparsity", float("nan")),
        ("steps", 0), ("batch_size", 0), ("epochs", 0), ("eval_windows", -1), ("checkpoint_every", 0),
        ("seq_len", 1), ("eval_length", 1), ("lr", 0.0), ("lr", -1.0), ("kd_weight", -1.0), ("kd_temperature", 0.0),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_the_name_of_its_option(field, value):
    assert f"--{field.replace('_', '-')} must" in complaint(lambda: config(**{field: value}))


@pytest.mark.parametrize("per", ["model", "kind"])
def test_a_uniform_shape_contradicts_budgets_other_than_equal_widths_and_both_are_named(per):
    message = complaint(lambda: config(shape="uniform", per=per))
    assert "--shape uniform" in message and f"--per {per}" in message


# --- defaults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "per"),
    [({}, "model"), ({"recipe": "paper"}, "kind"), ({"shape": "uniform"}, "expert"),
     ({"recipe": "paper", "shape": "uniform"}, "expert"), ({"recipe": "paper", "per": "model"}, "model"),
     ({"per": "layer"}, "layer")],
)  # fmt: skip
def test_the_scope_of_the_budget_follows_from_recipe_and_shape_unless_it_is_given(settings, per):
    assert config(**settings).resolved().per == per


def test_given_step_size_and_distillation_override_the_recipe():
    learning = config(lr=0.5, kd_weight=0.0, kd_temperature=3.0).resolved().learning
    assert (learning.lr, learning.kd_weight, learning.kd_temperature) == (0.5, 0.0, 3.0)


def test_the_paper_recipe_is_the_released_one():
    learning = config(recipe="paper").resolved().learning
    assert (learning.lr, learning.dual_lr, learning.dual_start) == (2e-2, (2e-2, 4e-1, 2e-2), (0.0, 0.0, 0.0))
    assert (learning.kd_weight, learning.kd_temperature, learning.init_noise) == (2.0, 1.0, 0.01)
    assert (learning.mu_start, learning.mu_end, learning.warmup_steps) == (0.5, 0.1, 100)


@pytest.mark.parametrize(
    ("settings", "per"),
    [({"method": "magnitude"}, "layer"), ({"method": "wanda-sp"}, "layer"), ({"method": "taylor-vector"}, "layer"),
     ({"method": "flap"}, "model"), ({"method": "sensitivity"}, "model"),
     ({"method": "flap", "recipe": "paper"}, "model"), ({"method": "grasprune", "recipe": "paper"}, "model"),
     ({"method": "hard-concrete"}, "model"),
     ({"method": "hard-concrete", "recipe": "paper"}, "kind"), ({"method": "magnitude", "per": "model"}, "model")],
)  # fmt: skip
def test_the_scope_of_the_budget_is_that_of_the_methods_paper(settings, per):
    assert config(**settings).resolved().per == per


@pytest.mark.parametrize(
    ("settings", "options"),
    [({"method": "flap", "shape": "uniform"}, ("--method flap", "--shape uniform")),
     ({"method": "flap", "lr": 0.1}, ("--method flap", "--lr")),
     ({"method": "magnitude", "kd_weight": 3.0}, ("--method magnitude", "--kd-weight")),
     ({"method": "wanda-sp", "kd_temperature": 2.0}, ("--method wanda-sp", "--kd-temperature")),
     ({"method": "taylor-element", "measure_every": 5}, ("--method taylor-element", "--measure-every")),
     ({"method": "sensitivity", "recipe": "paper"}, ("--method sensitivity", "--recipe paper")),
     ({"method": "flap", "binarise": False}, ("--method flap", "--no-binarise"))],
)  # fmt: skip
def test_options_that_contradict_a_method_are_refused_with_both_names(settings, options):
    message = complaint(lambda: config(**settings))
    assert all(option in message for option in options)


@pytest.mark.parametrize(
    ("method", "rows"), [("deterministic", 60), ("sensitivity", 60), ("magnitude", 0), ("flap", 400), ("wanda-sp", 400)]
)
def test_the_rows_that_are_scored_are_all_that_a_method_sees(method, rows):
    resolved = config(method=method, steps=200, batch_size=2).resolved()
    resolved.learning = replace(resolved.learning, sensitivity_batches=30)
    assert resolved.scored_rows == rows


# --- options over a file ---------------------------------------------------------------------------------------------


def parsed(file, *options):
    return parse("prune", Prune, ["--config", str(file), *options])


def test_a_config_file_alone_repeats_the_recipe_it_holds(file):
    odd = config(steps=300, lr=0.123).resolved()
    save_config(odd, file)
    options = parsed(file, "--out", "elsewhere", "--seed", "4")
    assert (options.learning, options.out, options.seed) == (odd.learning, Path("elsewhere"), 4)


@pytest.mark.parametrize(
    ("options", "settings"),
    [(("--steps", "60"), {"steps": 60}), (("--recipe", "paper"), {"recipe": "paper"}), (("--lr", "0.5"), {"lr": 0.5}),
     (("--kd-weight", "3"), {"kd_weight": 3.0}), (("--kd-temperature", "2"), {"kd_temperature": 2.0}),
     (("--no-binarise",), {"binarise": False}), (("--method", "grasprune"), {"method": "grasprune"})],
)  # fmt: skip
def test_an_option_that_the_recipe_depends_on_resolves_it_anew(file, options, settings):
    save_config(config(steps=300).resolved(), file)
    new = parsed(file, *options)
    assert new.resolved().learning == config(**{"steps": 300} | settings).resolved().learning
    assert new.resolved().learning != load_config(file).learning
