"""The built-in data set: children's stories assembled from parts, the same on every machine.

A story is made from a *plot*, one YAML file in ``story_parts/plots/``, and from the shared material beside that folder:

- ``cast.yaml``: who can appear: pools of kinds (child, woodland animal, ...), each with names and a few facts;
- ``phrases.yaml``: what several plots say: ways to begin, ways to speak, ...

A plot file has four parts::

    cast:        {hero: children, friend: house_pets} # role: its pool
    choose:      {toy: [{name: kite, needs: wind}]}   # choices made once per story, of records or of plain texts
    paragraphs:  [[opening, wish], [trouble], ...]    # the beats of each paragraph
    beats:       {opening: [text, text, ...], ...}    # the variants of each beat

Texts are written in a small template language:

- ``{toy}`` is the name of what was chosen for ``toy`` and ``{toy.needs}`` one of its fields;
- ``{hero}`` is a character's name, and ``{hero.they}``, ``.them``, ``.their``, ``.theirs``, ``.themselves`` are the
  pronouns that agree with it;
- ``{a:toy}`` puts "a" or "an" before the word, and a capital first letter (``{Toy}``, ``{A:toy}``, ``{Hero.they}``)
  capitalizes the text;
- ``[x|y|z]`` becomes one of its alternatives, picked independently each time; they nest, and one may be empty;
- a field whose value is a list is one of its items, picked once per story.

A story has about 40 bits of choice, so duplicates are unlikely among some hundred thousand (a test checks seed 0). Its
split depends on a checksum of its first paragraph: the two splits share no story, nor even an opening, for any seeds.
"""

import functools
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, get_args

import yaml

from tiny_lm.dataset.config import Split
from tiny_lm.errors import UserError

_PARTS = Path(__file__).parent / "story_parts"
_INDEX_BITS = 63
_MAX_WORDS = 220  # longer ones are rejected and regenerated: about one in a hundred
_PRONOUNS = {
    "she": {"they": "she", "them": "her", "their": "her", "theirs": "hers", "themselves": "herself"},
    "he": {"they": "he", "them": "him", "their": "his", "theirs": "his", "themselves": "himself"},
}
_TOKEN = re.compile(r"\{(?P<article>[aA]:)?(?P<role>[A-Za-z_]+)(?:\.(?P<field>[A-Za-z_]+))?\}|(?P<mark>[\[|\]{}])")
_SOUNDS_LIKE_A_VOWEL = re.compile(r"(?!uni|us[eu]|eu|one\b|once)[aeiou]|hour|honest", re.IGNORECASE)


class Slot(NamedTuple):
    """A slot in a template for the text of ``role.field``."""

    role: str
    field: str
    article: bool
    capital: bool


class Alternatives(NamedTuple):
    """A slot in a template for one of several texts."""

    options: tuple["Template", ...]


Template = tuple[str | Slot | Alternatives, ...]
Record = Mapping[str, tuple[Template, ...]]  # field -> its possible texts, of which a story uses one
Scene = dict[str, dict[str, Template]]  # role -> field -> text
Draw = Callable[[], float]


@dataclass(frozen=True)
class Plot:
    """The structure of a story, as its file defines it."""

    name: str
    cast: Mapping[str, str]
    choices: Mapping[str, Sequence[Record]]
    paragraphs: Sequence[Sequence[Sequence[Template]]]  # paragraph -> beat -> variants


@dataclass(frozen=True)
class Library:
    """All the material that stories are made of."""

    names: Mapping[str, Mapping[str, Sequence[str]]]  # set of names -> pronoun -> names
    pools: Mapping[str, Sequence[Record]]
    phrases: Mapping[str, dict[str, Template]]
    plots: Sequence[Plot]


def generate_stories(
    count: int, *, seed: int = 0, split: Split = "train", start: int = 0, num_plots: int | None = None
) -> Iterator[str]:
    """Yield ``count`` stories of one split, from story ``start`` on.

    Story ``i`` depends on the seed, the split and ``i`` alone, so any range can be made without the stories before it.

    Args:
        count: how many stories, at least 0.
        seed: any integer; each gives other stories.
        split: which half of the possible stories to draw from.
        start: index of the first story, at least 0.
        num_plots: use only the first N plots; None: all.

    Raises:
        UserError: a number is out of range or the split is unknown (raised at the call, not at the first story).
    """
    if count < 0:
        raise UserError(f"the number of stories must be 0 or more, not {count}")
    _check(start, split)
    return (story(index, seed=seed, split=split, num_plots=num_plots) for index in range(start, start + count))


def story(index: int, *, seed: int = 0, split: Split = "train", num_plots: int | None = None) -> str:
    """Return story ``index`` of a seed: paragraphs of plain ASCII text, one per line, without a final newline.

    Raises:
        UserError: the index is negative or 2**63 or more, or the split is unknown.
    """
    _check(index, split)
    # Across versions Python guarantees only the sequence of random() for an integer seed: use nothing else.
    draw = Random(((seed % 2**64) << (_INDEX_BITS + 1)) | (index << 1) | (split == "train")).random
    material = library()
    plots = material.plots[:num_plots]
    while True:
        plot = _pick(plots, draw)
        scene = _scene(plot, material, draw)
        opening = _paragraph(plot.paragraphs[0], scene, draw)
        if split_of(opening) == split:
            text = "\n".join([opening, *(_paragraph(beats, scene, draw) for beats in plot.paragraphs[1:])])
            if text.count(" ") + text.count("\n") < _MAX_WORDS:
                return text


def split_of(text: str) -> Split:
    """Return the split that a story, or its first paragraph alone, belongs to."""
    return "train" if zlib.crc32(text.partition("\n")[0].encode()) & 1 else "validation"


def _check(index: int, split: str) -> None:
    if not 0 <= index < 2**_INDEX_BITS:
        raise UserError(f"a story's index must be from 0 to 2**{_INDEX_BITS} - 1, not {index}")
    if split not in get_args(Split):
        raise UserError(f"unknown split {split!r} of the built-in stories; use train or validation")


def _pick(options: Sequence[Any], draw: Draw) -> Any:
    return options[int(draw() * len(options))] if len(options) > 1 else options[0]


def _paragraph(beats: Sequence[Sequence[Template]], scene: Scene, draw: Draw) -> str:
    return " ".join([expand(_pick(ways, draw), scene, draw) for ways in beats])


def expand(template: Template, scene: Scene, draw: Draw) -> str:
    """Return the text of a template: fill its slots from the scene and pick its alternatives."""
    pieces = []
    for part in template:
        if isinstance(part, str):
            pieces.append(part)
        elif isinstance(part, Alternatives):
            pieces.append(expand(_pick(part.options, draw), scene, draw))
        else:
            text = expand(scene[part.role][part.field], scene, draw)
            if part.article:
                text = ("an " if _SOUNDS_LIKE_A_VOWEL.match(text) else "a ") + text
            pieces.append(text[:1].upper() + text[1:] if part.capital else text)
    return "".join(pieces)


def _scene(plot: Plot, material: Library, draw: Draw) -> Scene:
    """Cast a plot and make the choices that hold for the whole story."""
    scene: Scene = dict(material.phrases)
    cast: list[dict[str, Template]] = []
    for role, pool in plot.cast.items():
        while not _clear(character := _character(material.pools[pool], material, draw), cast):
            pass
        cast.append(character)
        scene[role] = character
    for role, records in plot.choices.items():
        scene[role] = _bind(_pick(records, draw), draw)
    return scene


def _bind(record: Record, draw: Draw) -> dict[str, Template]:
    return {field: _pick(options, draw) for field, options in record.items()}


def _character(pool: Sequence[Record], material: Library, draw: Draw) -> dict[str, Template]:
    """Pick a character: a kind from the pool, then a pronoun and a name unless the kind has them."""
    character = _bind(_pick(pool, draw), draw)
    if "pronoun" not in character:
        character["pronoun"] = (_pick(tuple(_PRONOUNS), draw),)
    pronoun = str(character["pronoun"][0])
    if "name" not in character:
        character["name"] = (_pick(material.names[str(character["names"][0])][pronoun], draw),)
    for field, word in _PRONOUNS[pronoun].items():
        character[field] = (word,)
    return character


def _clear(character: Mapping[str, Template], cast: Sequence[Mapping[str, Template]]) -> bool:
    """Return whether readers can distinguish a character from those already cast.

    No two share a name, and the first two differ in kind and pronoun, so that "he" and "she" are unambiguous.
    """
    if len(cast) == 1 and any(character[field] == cast[0][field] for field in ("kind", "pronoun")):
        return False
    return all(character["name"] != other["name"] for other in cast)


@functools.cache
def library() -> Library:
    """Read and compile the material; once per process."""
    cast = _read("cast.yaml")
    kinds = {kind: _record({"kind": kind, **fields}) for kind, fields in cast["kinds"].items()}
    pools = {name: [kinds[kind] for kind in members] for name, members in cast["pools"].items()}
    phrases = {name: {"name": compile_template(text)} for name, text in _read("phrases.yaml").items()}
    plots = [_plot(path) for path in sorted((_PARTS / "plots").glob("*.yaml"))]
    return Library(cast["names"], pools, phrases, plots)


def _read(name: str) -> Any:
    # The C loader is some ten times faster; both read the same YAML.
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load((_PARTS / name).read_text(encoding="utf-8"), Loader=loader)


def _plot(path: Path) -> Plot:
    raw = _read(f"plots/{path.name}")
    choices = {
        role: [_record(option if isinstance(option, dict) else {"name": option}) for option in options]
        for role, options in raw["choose"].items()
    }
    beats = {name: [compile_template(text) for text in ways] for name, ways in raw["beats"].items()}
    paragraphs = [[beats[name] for name in names] for names in raw["paragraphs"]]
    return Plot(path.stem, raw["cast"], choices, paragraphs)


def _record(fields: Mapping[str, Any]) -> Record:
    return {
        field: tuple(compile_template(text) for text in (value if isinstance(value, list) else [value]))
        for field, value in fields.items()
    }


def compile_template(text: str) -> Template:
    """Parse a template into literal texts, slots and choices.

    Raises:
        ValueError: a bracket or brace is not matched, or a slot is misspelt.
    """
    text = re.sub(r"\s+([|\]])", r"\1", " ".join(text.split()))  # alternatives may be on separate lines
    # One list of options per open bracket, the whole text being the only option of the outermost one.
    open_choices: list[list[list[str | Slot | Alternatives]]] = [[[]]]
    end = 0
    for match in _TOKEN.finditer(text):
        options = open_choices[-1]
        if match.start() > end:
            options[-1].append(text[end : match.start()])
        end = match.end()
        mark = match["mark"]
        if mark is None:
            options[-1].append(_slot(match))
        elif mark == "[":
            open_choices.append([[]])
        elif mark == "|" and len(open_choices) > 1:
            options.append([])
        elif mark == "]" and len(open_choices) > 1:
            closed = Alternatives(tuple(tuple(option) for option in open_choices.pop()))
            open_choices[-1][-1].append(closed)
        else:
            raise ValueError(f"unexpected {mark!r} at character {match.start()} of {text!r}")
    if len(open_choices) > 1:
        raise ValueError(f"a '[' is never closed in {text!r}")
    rest = (text[end:],) if end < len(text) else ()
    return (*open_choices[0][0], *rest)


def _slot(match: re.Match[str]) -> Slot:
    return Slot(match["role"].lower(), match["field"] or "name", bool(match["article"]), match[0][1].isupper())
