"""The YAML loader that every config shares: strict keys, typed values, overrides, dump.

A config is a frozen pydantic dataclass that inherits from :class:`Config`::

    @config_dataclass
    class BinDataConfig(Config):
        folder: ClassVar[str] = "data"
        train_path: str
        block_size: int = Field(ge=1, description="tokens in a sequence")

    config = BinDataConfig.from_yaml("tinystories-8k", {"block_size": 128})

Any problem with a file raises one :class:`~tiny_lm.errors.UserError` that names file, key, value and the nearest valid
key.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast, get_args, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import Self, dataclass_transform

from tiny_lm.errors import UserError
from tiny_lm.files import write_text
from tiny_lm.reading import read_text

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_T = TypeVar("_T")
_FILE_LIMIT = 2**20  # bytes; the largest shipped config has under 2,000


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config_dataclass(cls: type[_T]) -> type[_T]:
    """Make ``cls`` a frozen, keyword-only pydantic dataclass that rejects unknown keys."""
    settings = ConfigDict(extra="forbid", allow_inf_nan=False)
    return cast(type[_T], pydantic_dataclass(frozen=True, kw_only=True, config=settings)(cls))


class Config:
    """Base of all configs; ``folder`` is their folder under ``configs/``."""

    folder: ClassVar[str]

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> Self:
        """Load a config from a YAML file, or from a shipped config by its bare name.

        Args:
            path: a file, or the name of a config such as ``tinystories-8k``.
            overrides: values by key that replace those of the file; a dotted key reaches into a mapping.

        Raises:
            UserError: the file is missing or not a valid config of this kind.
        """
        file = find_config(cls.folder, path)
        return cls.from_dict(override(read_yaml(file), overrides or {}), source=name_source(file, overrides))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "config") -> Self:
        """Build a config from plain values; ``source`` names their origin in errors."""
        return validate(cls, values, source=source)

    def to_dict(self) -> dict[str, Any]:
        """Return the config as plain values that :meth:`from_dict` takes."""
        values: dict[str, Any] = TypeAdapter(type(self)).dump_python(self, mode="json")
        return values

    def to_yaml(self) -> str:
        """Return the resolved config as YAML text."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def save(self, path: Path) -> None:
        """Write the resolved config to ``path`` as YAML."""
        write_text(path, self.to_yaml())


def validate(kind: type[_T], values: Mapping[str, Any], *, source: str) -> _T:
    """Build the config class ``kind`` from ``values``, strictly: a string is not a number and a float not an integer.

    Raises:
        UserError: naming source, key and value; for an unknown key also the nearest valid one.
    """
    try:
        # Strict mode on JSON (unlike on Python values) accepts a list as a tuple and an int as a float, nothing more.
        text = json.dumps(values)
        return TypeAdapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        raise UserError(f"{source}: {_describe(kind, values, error)}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{source}: holds a value of an unsupported type ({error})") from None


def _describe(kind: type, values: Mapping[str, Any], error: ValidationError) -> str:
    """Describe the first problem of a pydantic error in one line."""
    # pydantic reports problems in field order; a misspelled key explains a missing one, so it comes first.
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "unexpected_keyword_argument")
    problem = problems[0]
    path_in_config = _locate(problem, values)
    *parents, name = map(str, path_in_config)
    key = ".".join([*parents, name])
    if problem["type"] == "unexpected_keyword_argument":
        return f"unknown key {key!r}{nearest(name, _field_names(kind, parents))}"
    if problem["type"].startswith("missing") and isinstance(problem["loc"][-1], str):
        return f"the key {key!r} is missing"
    # A value of several allowed types has a problem for each.
    message = " or ".join(_message(other) for other in problems if _locate(other, values) == path_in_config)
    return f"{key}: {message} (it is {shorten(problem['input'])})" if key else message


def _locate(problem: "ErrorDetails", values: Mapping[str, Any]) -> tuple[int | str, ...]:
    """Return the path of a problem's value, without the type or element that pydantic appends."""
    *path_in_config, last = problem["loc"] or ("",)
    if problem["type"] in ("unexpected_keyword_argument", "missing", "missing_argument") and isinstance(last, str):
        return problem["loc"]
    value: Any = values
    for part in path_in_config:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            break
    return tuple(path_in_config) if path_in_config and value == problem["input"] else problem["loc"] or ("",)


def _message(problem: "ErrorDetails") -> str:
    """Describe what is wrong with a value."""
    if problem["type"] == "tuple_type":
        return f"input should be a list, such as [{problem['input']}]"
    if problem["type"] == "missing":
        return "has too few elements"
    message = problem["msg"].removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _field_names(kind: type, parents: Iterable[str]) -> list[str]:
    """Return the keys of a config class, or of the nested one at ``parents``."""
    for parent in parents:
        hint = get_type_hints(kind).get(parent)
        choices = [hint, *get_args(hint)]  # the field may be optional
        kind = next(
            (choice for choice in choices if isinstance(choice, type) and dataclasses.is_dataclass(choice)), object
        )
    return [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def shorten(value: object, limit: int = 60) -> str:
    """Return the repr of a value for an error, truncated."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the candidate nearest to ``name``, else the list of candidates."""
    choices = sorted(candidates)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are: {', '.join(choices)}" if choices else ""


# --- files -----------------------------------------------------------------------------------------------------------


def shipped_configs() -> Path:
    """Return the folder of the shipped configs: inside a wheel, or at the root of a checkout."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def find_config(kind: str, path: str | Path) -> Path:
    """Find a config by path or name.

    An existing file is used as is; otherwise the file of that name in ``./configs/<kind>/``, then among the shipped
    ones, so that ``tinystories-8k`` and ``configs/data/tinystories-8k.yaml`` work in an empty folder too.

    Raises:
        UserError: it does not exist; the nearest name is suggested.
    """
    given = Path(path)
    if given.is_file():
        return given
    folders = [Path("configs") / kind, shipped_configs() / kind]
    # A path elsewhere (`other/file.yaml`) means only that file.
    if given.parent in (Path(), Path("configs") / kind) and given.suffix in ("", ".yaml", ".yml"):
        for folder in folders:
            candidate = folder / f"{given.stem if given.suffix else given.name}.yaml"
            if candidate.is_file():
                return candidate
    known = {file.stem for folder in folders if folder.is_dir() for file in folder.glob("*.yaml")}
    raise UserError(f"{given}: no such {kind} config{nearest(given.stem, known)}")


class _StrictLoader(yaml.SafeLoader):
    """Strict YAML: no repeated keys, no aliases (which can expand exponentially), and 1e-3 is a number."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.get_mark()
            raise yaml.constructor.ConstructorError(None, None, "aliases are not supported", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                problem = f"the key {shorten(key)} is not a string"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key in seen:
                problem = f"the key {key!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# PyYAML follows YAML 1.1, where 3e-4 without a dot is a string; this is the float of YAML 1.2.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, *, source: str) -> Any:
    """Parse YAML text strictly.

    Raises:
        UserError: with the line in ``source`` and the problem.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        position = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).replace("\n", " ")
        raise UserError(f"{source}{position}: is not valid YAML ({problem})") from None
    # PyYAML raises the others for a tag such as !!int or !!timestamp on an invalid value.
    except (ValueError, RecursionError, OverflowError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{source}: is not valid YAML ({error})") from None


def read_yaml(file: Path) -> dict[str, Any]:
    """Read a YAML file with one mapping.

    Raises:
        UserError: the file cannot be read, is too large, or holds anything else.
    """
    values = parse_yaml(read_text(file, limit=_FILE_LIMIT), source=str(file))
    if not isinstance(values, dict):
        raise UserError(f"{file}: must hold keys and values, but holds {shorten(values)}")
    return values


# --- overrides -------------------------------------------------------------------------------------------------------


def override(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values`` with each dotted key of ``overrides`` replaced."""
    result = dict(values)
    for key, value in overrides.items():
        head, _, rest = key.partition(".")
        if rest:
            inner = result.get(head)
            result[head] = override(inner if isinstance(inner, dict) else {}, {rest: value})
        else:
            result[head] = value
    return result


def name_source(file: Path, overrides: Mapping[str, Any] | None) -> str:
    """Return the origin of a config, with which errors start."""
    return f"{file} with --set" if overrides else str(file)


def parse_overrides(settings: Iterable[str], sections: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Read ``section.key=value`` settings of the command line; values are YAML.

    Returns:
        the overrides by key for each section.

    Raises:
        UserError: a setting is malformed or names an unknown section.
    """
    result: dict[str, dict[str, Any]] = {section: {} for section in sections}
    for setting in settings:
        path, equals, text = setting.partition("=")
        section, dot, key = path.strip().partition(".")
        if not (equals and dot and key):
            raise UserError(f"--set {setting}: the form is section.key=value; sections: {', '.join(result)}")
        if section not in result:
            raise UserError(f"--set {setting}: unknown section {section!r}{nearest(section, result)}")
        result[section][key] = parse_yaml(text, source=f"--set {setting}")
    return result
