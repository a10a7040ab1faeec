"""The built-in stories: the same everywhere, all different, and in correct English."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from random import Random

import pytest

from tiny_lm.dataset import stories
from tiny_lm.dataset.config import Split
from tiny_lm.dataset.stories import (
    Alternatives,
    Slot,
    Template,
    compile_template,
    generate_stories,
    library,
    split_of,
    story,
)
from tiny_lm.errors import UserError

# What must never be read in a story. A match is told with its surroundings.
LINTS = {
    "a before a vowel": re.compile(r"\b[Aa] (?!uni|us[eu]|eu|one\b|once)[aeiouAEIOU]"),
    "an before a consonant": re.compile(r"\b[Aa]n (?!hour|honest)[^aeiouAEIOU]"),
    "doubled word": re.compile(r"\b(\w+) \1\b", re.IGNORECASE),
    "space before punctuation": re.compile(r"\s[,.!?;:]"),
    "doubled space": re.compile(r"  | $|^ ", re.MULTILINE),
    "template mark": re.compile(r"[{}\[\]|_]"),
    "not plain ASCII": re.compile(r"[^\x20-\x7e\n]"),
    "small letter after a full stop": re.compile(r"(?:^|(?<!Mr)(?<!Mrs)\. )\"?[a-z]", re.MULTILINE),
    "doubled punctuation": re.compile(r"[.,!?;:][.,!?;:]"),
    "no full stop": re.compile(r"[^.!?\"]$", re.MULTILINE),
    "no punctuation before a closing quote": re.compile(r"\w\"(?=\s|$)", re.MULTILINE),
    "comma before a new sentence": re.compile(r",\" (?:The|Then|And|But|So)\b"),
    "capital in the middle": re.compile(r"\b(?:she|he|her|his|they|and|but) (?:The|An?|She|He|Her|His|They)\b"),
    "name that is no name": re.compile(r"\b(?:None|null|True|False)\b"),
}


@pytest.fixture(scope="module")
def sample() -> list[str]:
    """The first 100,000 stories of seed 0."""
    return list(generate_stories(100_000))


@pytest.fixture(scope="module")
def validation() -> list[str]:
    return list(generate_stories(20_000, split="validation"))


def test_stories_are_the_same_bytes_everywhere() -> None:
    def digest(split: Split) -> str:
        return hashlib.sha256("\0".join(generate_stories(100, split=split)).encode()).hexdigest()

    assert digest("train") == "2aa64b14a6a3e6ae0e389130df452cacdf98b65c3036059f675306e71a545fcb"
    assert digest("validation") == "029f7cf9d4f0c08f0fbdee8101cc27d0a591b758fe9c2db807eea8d4faaec019"


def test_story_depends_on_seed_split_and_index_alone() -> None:
    assert list(generate_stories(20, seed=7, start=30)) == list(generate_stories(50, seed=7))[30:]
    assert story(31, seed=7) == next(islice(generate_stories(2, seed=7, start=30), 1, None))
    assert story(31, seed=7) != story(31, seed=8)
    assert story(31, seed=-7) != story(31, seed=7)
    assert list(generate_stories(0)) == []


def test_no_two_stories_are_equal(sample: list[str]) -> None:
    assert len(set(sample)) == len(sample) == 100_000


def test_splits_share_no_story_whatever_the_seeds(sample: list[str], validation: list[str]) -> None:
    other_seeds = [text for seed in range(1, 20) for text in generate_stories(500, seed=seed)]
    assert not set(validation) & set(sample + other_seeds)
    assert {split_of(text) for text in sample + other_seeds} == {"train"}
    assert {split_of(text) for text in validation} == {"validation"}
    train_openings = {text.split("\n")[0] for text in sample}
    assert train_openings.isdisjoint(text.split("\n")[0] for text in validation)


def test_vocabulary_and_shape(sample: list[str]) -> None:
    words = {word for text in sample[:20_000] for word in re.findall(r"[a-z]+", text.lower())}
    assert len(words) >= 2_000
    lengths = [len(text.split()) for text in sample]
    assert min(lengths) >= 120
    assert max(lengths) <= 220
    assert all(3 <= len(text.split("\n")) <= 5 for text in sample)


def test_every_plot_is_told_about_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, int] = {}
    cast_and_choose = stories._scene

    def count(plot: stories.Plot, *rest: object) -> stories.Scene:
        told[plot.name] = told.get(plot.name, 0) + 1
        return cast_and_choose(plot, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(stories, "_scene", count)
    list(generate_stories(2_000))
    assert len(told) == len(library().plots) >= 20
    assert min(told.values()) > 0.5 * sum(told.values()) / len(told)


def test_fewer_plots_are_the_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    few = list(generate_stories(200, num_plots=12))
    first = replace(library(), plots=library().plots[:12])
    monkeypatch.setattr(stories, "library", lambda: first)
    assert few == list(generate_stories(200))


@pytest.mark.parametrize("rule", LINTS)
def test_grammar(rule: str, sample: list[str], validation: list[str]) -> None:
    faults = [
        text[max(0, match.start() - 40) : match.end() + 40]
        for text in sample[:8_000] + validation[:2_000]
        for match in LINTS[rule].finditer(text)
    ]
    assert not faults, faults[:5]


def test_quotes_are_balanced_and_begin_with_a_capital(sample: list[str]) -> None:
    for text in sample[:10_000]:
        for paragraph in text.split("\n"):
            assert paragraph.count('"') % 2 == 0, paragraph
            for spoken in re.findall(r'"([^"]*)"', paragraph):
                assert re.match(r"\S", spoken) and re.search(r"[.,!?]$", spoken), paragraph


def test_pronouns_agree_with_names(sample: list[str]) -> None:
    """A child whose kind and name stand in the opening is never given the other pronoun set's name."""
    names = library().names["children"]
    girls, boys = set(names["she"]), set(names["he"])
    assert not girls & boys
    for text in sample[:20_000]:
        for kind, name in re.findall(r"\b(girl|boy) (?:named|called|whose name was) (\w+)", text):
            assert name in (girls if kind == "girl" else boys), text


def test_every_template_can_be_expanded() -> None:
    """Each alternative of each template finds its slots in every scene of its plot."""
    material = library()
    for plot in material.plots:
        scene = stories._scene(plot, material, Random(0).random)
        for role, records in plot.choices.items():
            assert len({frozenset(record) for record in records}) == 1, (
                f"{plot.name}: the {role}s differ in their fields"
            )
        pools = {role: material.pools[pool] for role, pool in plot.cast.items()}
        for slot in _slots(_templates(plot), scene):
            where = f"{plot.name}: {{{slot.role}.{slot.field}}}"
            assert slot.role in scene, where
            if slot.role in pools and slot.field not in {"name", "they", "them", "their", "theirs", "themselves"}:
                assert all(slot.field in kind for kind in pools[slot.role]), where
            else:
                assert slot.field in scene[slot.role], where


def _slots(templates: list[Template], scene: stories.Scene) -> Iterator[Slot]:
    """Yield every slot of the templates, and of the phrases that they use, to any depth."""
    for template in templates:
        for part in template:
            if isinstance(part, Alternatives):
                yield from _slots(list(part.options), scene)
            elif isinstance(part, Slot):
                yield part
                if part.role in library().phrases:
                    yield from _slots([scene[part.role]["name"]], scene)


def test_every_phrase_and_every_pool_is_used() -> None:
    material = library()
    pools = {pool for plot in material.plots for pool in plot.cast.values()}
    assert pools == set(material.pools)
    slots = {slot.role for plot in material.plots for slot in _slots(_templates(plot), dict(material.phrases))}
    assert set(material.phrases) <= slots


def _templates(plot: stories.Plot) -> list[Template]:
    beats = [way for beats in plot.paragraphs for ways in beats for way in ways]
    fields = [options for records in plot.choices.values() for record in records for options in record.values()]
    return beats + [text for options in fields for text in options]


def test_plots_offer_several_ways_to_tell_each_beat() -> None:
    for plot in library().plots:
        beats = [ways for paragraph in plot.paragraphs for ways in paragraph]
        assert sum(len(ways) >= 2 for ways in beats) >= len(beats) - 1, plot.name
        assert all(len(records) >= 4 for records in plot.choices.values()), plot.name
        assert len(plot.paragraphs[-1][-1]) >= 3, f"{plot.name}: give it another ending"


def test_templates() -> None:
    scene = {
        "toy": {"name": ("orange kite",)},
        "hero": {"name": ("Mia",), "they": ("she",)},
        "x": {"name": ("unicorn",)},
    }

    def texts(template: str) -> set[str]:
        draw = Random(1).random
        return {stories.expand(compile_template(template), scene, draw) for _ in range(60)}

    assert texts("{A:toy}, {a:toy} and {a:x}. {Toy}! {Hero.they} {hero}.") == {
        "An orange kite, an orange kite and a unicorn. Orange kite! She Mia."
    }
    assert texts("so[ very|] [big|[small|tiny]]") == {
        f"so{very} {size}" for very in (" very", "") for size in ("big", "small", "tiny")
    }
    assert texts("[one\n |two\n ]!") == {"one!", "two!"}


@pytest.mark.parametrize("broken", ["[a|b", "a]", "a|b", "{toy", "{toy name}", "{}", "[a|{b]"])
def test_broken_templates_are_refused(broken: str) -> None:
    with pytest.raises(ValueError, match=r"unexpected|never closed"):
        compile_template(broken)


def test_mistakes_are_told_at_the_call() -> None:
    with pytest.raises(UserError, match="0 or more, not -1"):
        generate_stories(-1)
    with pytest.raises(UserError, match="index must be"):
        generate_stories(1, start=-1)
    with pytest.raises(UserError, match="unknown split 'test'"):
        generate_stories(1, split="test")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="index must be"):
        story(2**63)
