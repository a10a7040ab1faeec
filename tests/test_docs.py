"""What the documents say: the commands exist with their options, the links lead somewhere, the figures are true."""

import ast
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from tiny_lm.cli import main
from tiny_lm.config import find_config
from tiny_lm.data import BinDataConfig
from tiny_lm.dataset import DatasetConfig
from tiny_lm.model import load_model_config, num_parameters
from tiny_lm.tokenizer import TokenizerConfig
from tiny_lm.training import TrainingConfig

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "dev" / "LOG.md"]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
GROUPS = ("data", "export", "tokenizer")
TUTORIAL_CONFIGS = {"dataset.yaml", "tokenizer.yaml", "model.yaml", "data.yaml", "training.yaml"}


def commands() -> list[str]:
    """Every `tiny-lm` command line in a block or between backquotes."""
    found = set()
    for document in DOCUMENTS:
        if document.name == "cli.md":
            continue  # written from the commands
        text = document.read_text(encoding="utf-8")
        found |= set(re.findall(r"^(?:    |\$ )(tiny-lm [a-z].*?)(?: +#.*)?$", text, flags=re.MULTILINE))
        found |= set(re.findall(r"`(tiny-lm [a-z][^`]*)`", text))
    return sorted(found)


@pytest.mark.parametrize("line", commands())
def test_every_command_in_the_documents_exists(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(line)[1:]
    command = words[:2] if words[0] in GROUPS else words[:1]
    monkeypatch.setattr(sys, "argv", ["tiny-lm", *command, "--help"])
    with pytest.raises(SystemExit) as exit_:
        main()
    shown = capsys.readouterr().out
    assert not exit_.value.code
    for option in (word for word in words if word.startswith("--")):
        assert option.partition("=")[0] in shown, f"{' '.join(command)} has no {option}"
    for option, kind in (("--config", "tokenizers" if command != ["data", "download"] else "datasets"),):
        if option in words and words[words.index(option) + 1] not in TUTORIAL_CONFIGS:
            find_config(kind, words[words.index(option) + 1])


def test_tutorial_configs_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    for block, name in re.findall(r"```yaml\n(# (.*?)\n.*?)```", text, flags=re.DOTALL):
        Path(name).write_text(block, encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == TUTORIAL_CONFIGS
    assert TokenizerConfig.from_yaml("tokenizer.yaml").dataset_config == "dataset.yaml"
    assert DatasetConfig.from_yaml("dataset.yaml").source == "local"
    TrainingConfig.from_yaml("training.yaml")
    BinDataConfig.from_yaml("data.yaml")
    assert f"parameters      {num_parameters(load_model_config('model.yaml')):,}\n" in text


def test_links_lead_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_the_readme_tells_the_true_size_of_the_quickstart_model() -> None:
    assert f"{num_parameters(load_model_config('quickstart')):,} parameters" in (ROOT / "README.md").read_text()


def test_no_placeholder_is_left() -> None:
    for document in DOCUMENTS:
        assert "@@" not in document.read_text(encoding="utf-8"), document


def defined_names(path: Path) -> set[str]:
    """Every function and class of a module; methods as `Class.method`."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            names.add(node.name)
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, FUNCTIONS)}
    return names


def test_walks_through_the_code_are_true() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    walks = text.partition("\n## Five walks\n")[2].partition("\n## ")[0].split("\n\n**")[1:]
    assert len(walks) == 5
    for walk in walks:
        stops = re.findall(r"^\d\. `(tiny_lm/\S+)`: `(\S+)`", walk, flags=re.MULTILINE)
        assert 3 <= len(stops) == len(re.findall(r"^\d\.", walk, flags=re.MULTILINE)) <= 7
        for file, name in stops:
            assert name in defined_names(ROOT / file), f"{file} has no {name}"


def test_cli_reference_is_up_to_date() -> None:
    reference = runpy.run_path(str(ROOT / "scripts" / "write_cli_reference.py"))["render"]()
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == reference, "run `make docs-cli`"
