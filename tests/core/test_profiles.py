"""The settings of a run: what profiles say, and which values are refused."""

import dataclasses
import math

import pytest

from irpo_utils import UserError, methods, profiles
from irpo_utils.profiles import Profile


def test_changes_are_applied_and_others_kept():
    p = profiles.get("smoke", n_samples=3, data="all", pad_token="all")
    assert (p.n_samples, p.iterations, p.engine) == (3, 2, "cpu")
    assert (p.data, p.pad_token) == ("all", "all")  # a name like any other


@pytest.mark.parametrize("name", profiles.names())
def test_every_profile_can_be_read(name):
    p = profiles.get(name)
    assert methods.apply(p).iterations >= 0
    assert {type(getattr(p, field)) for field in ("learning_rate", "beta", "alpha")} <= {float, int}
    assert isinstance(p.learning_rate, float)  # YAML reads 1e-5 without a dot as text


def test_recipes_are_yaml_files_with_comments():
    recipes = sorted(profiles.RECIPES.glob("*.yaml"))
    assert len(recipes) >= 10 and {"paper", "smoke", "cpu"} <= set(profiles.names())
    for path in recipes:
        assert "#" in path.read_text(), path.name


def test_every_field_has_a_help_text():
    for field in dataclasses.fields(Profile):
        assert len(field.metadata["help"]) > 5, field.name


def test_unknown_profiles_and_fields_are_refused():
    with pytest.raises(UserError, match="no profile 'gpu'.*smoke"):
        profiles.get("gpu")
    with pytest.raises(UserError, match="no setting n_sample, only .*n_samples"):
        profiles.get("smoke", n_sample=3)


@pytest.mark.parametrize(
    "change, option",
    [
        ({"n_samples": 0}, "--n-samples"),
        ({"n_questions": 0}, "--n-questions"),
        ({"max_length": 0}, "--max-length"),
        ({"iterations": -1}, "--iterations"),
        ({"alpha": -0.1}, "--alpha"),
        ({"beta": 0.0}, "--beta"),
        ({"learning_rate": math.inf}, "--learning-rate"),
        ({"learning_rate": math.nan}, "--learning-rate"),
        ({"epochs": 0}, "--epochs"),
        ({"warmup_ratio": 1.0}, "--warmup-ratio"),
        ({"top_p": 0.0}, "--top-p"),
        ({"temperature": []}, "--temperature"),
        ({"temperature": [1.0, 0.0]}, "--temperature"),
        ({"temperature": 0.8}, "--temperature is 0.8: it must be a list"),
        ({"learning_rate": "1e-5"}, "--learning-rate is '1e-5': it must be of type float"),
        ({"loss": "sft", "alpha": 0.0}, "--alpha is 0.0: it must be above 0 with --loss sft"),
        ({"batch_size": 6, "micro_batch_size": 4}, "--batch-size"),
        ({"pairing": "all"}, "--pairing"),
        ({"reference": "last"}, "--reference"),
        ({"dtype": "all"}, "--dtype"),
        ({"eval_split": "dev"}, "--eval-split"),
    ],
)
def test_values_that_cannot_work_are_refused_with_the_name_of_the_option(change, option):
    with pytest.raises(UserError, match=option):
        profiles.get("smoke", **change)


@pytest.mark.parametrize("name", ["data", "start", "model", "probe"])
@pytest.mark.parametrize("path", ["keepme.csv::run1", "hf://datasets/x"])
def test_paths_that_datasets_reads_as_addresses_are_refused(name, path):
    with pytest.raises(UserError, match=f"--{name} is .*without '::' and '://'"):
        profiles.get("smoke", **{name: path})


def test_the_last_temperature_is_used_from_then_on():
    p = Profile(temperature=[0.8, 1.2])
    assert [p.temperature_of(t) for t in range(4)] == [0.8, 1.2, 1.2, 1.2]


@pytest.mark.parametrize(
    "changes", [{"temperature": [float("inf")]}, {"temperature": [1.0, float("nan")]}]
)
def test_temperatures_that_are_no_numbers_are_refused(changes):
    with pytest.raises(UserError, match="temperature"):
        profiles.get("smoke", **changes)
