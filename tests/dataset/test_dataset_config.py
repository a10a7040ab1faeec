"""Data set configs: the shipped ones, the documented form, and what is refused."""

from pathlib import Path

import pytest

from tiny_lm.config import shipped_configs
from tiny_lm.dataset import DatasetConfig, Filters, Splits, describe
from tiny_lm.errors import UserError

SHIPPED = {
    "quickstart": "stories:20000:seed0:plots12",
    "stories": "stories:100000:seed0",
    "swallow-code": "huggingface:tokyotech-llm/swallow-code:swallow-code",
    "tinystories": "huggingface:roneneldan/TinyStories",
    "tinystories-10k": "huggingface:roneneldan/TinyStories",
}


def test_every_shipped_file_is_known_and_loads():
    assert {file.stem for file in (shipped_configs() / "datasets").glob("*.yaml")} == set(SHIPPED)
    for name, origin in SHIPPED.items():
        config = DatasetConfig.from_yaml(name)
        assert describe(config) == origin
        assert DatasetConfig.from_dict(config.to_dict()) == config


def test_shipped_splits_are_the_documented_ones():
    stories, code, first = (
        DatasetConfig.from_yaml(name) for name in ("tinystories", "swallow-code", "tinystories-10k")
    )
    assert (stories.split_name("train"), stories.split_name("validation")) == ("train", "validation")
    assert (code.split_name("train"), code.split_name("validation")) == ("train", None)
    assert first.filters.max_documents == 10_000


@pytest.mark.parametrize("filters", ["", "null", "{}", "{min_chars: null}"])
def test_a_file_of_the_documented_form_loads(tmp_path: Path, filters: str):
    file = tmp_path / "old.yaml"
    file.write_text(
        "name: owner/set\nsource: huggingface\ntext_field: story\nconfig_name: main\n"
        f"splits:\n  train: train\n  validation: test\nfilters: {filters}\n"
    )
    config = DatasetConfig.from_yaml(file)
    assert config.splits == Splits(train="train", validation="test")
    assert config.filters == Filters()


def test_absent_splits_mean_the_usual_names_on_the_hub_and_none_elsewhere():
    assert DatasetConfig(name="a/b").split_name("validation") == "validation"
    assert DatasetConfig(name="a.txt", source="local").split_name("train") is None
    named = DatasetConfig.from_dict({"name": "a/b", "splits": {"train": "all"}})
    assert (named.split_name("train"), named.split_name("validation")) == ("all", None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "'name' is missing"),
        ({"name": "x", "sorce": "local"}, "did you mean 'source'"),
        ({"name": "x", "source": "locale"}, "source: "),
        ({"name": "x", "filters": {"min_words": "3"}}, "filters.min_words"),
        ({"name": "x", "filters": {"min_chars": 0}}, "filters.min_chars"),
        ({"name": "x", "filters": {"min_words": 9, "max_words": 3}}, "no document can pass"),
        ({"name": "x", "splits": {"validation": "v"}}, "splits.train"),
        ({"name": "x", "source": "local", "revision": "v1"}, "revision belongs to"),
        ({"name": "x", "source": "stories", "splits": {"train": "a"}}, "no named splits"),
        ({"name": "x", "separator": ""}, "one line"),
        ({"name": "x", "separator": "a\nb"}, "one line"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(values: dict, message: str):
    with pytest.raises(UserError, match=r"^[^\n]+$") as caught:
        DatasetConfig.from_dict(values)
    assert message in str(caught.value)
