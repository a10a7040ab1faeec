import random
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from tiny_lm.config import Config, config_dataclass, find_config, parse_overrides, parse_yaml, shipped_configs
from tiny_lm.data import BinDataConfig
from tiny_lm.dataset import DatasetConfig
from tiny_lm.errors import UserError
from tiny_lm.model.config import load_model_config, model_config_from_dict
from tiny_lm.profile import Profile
from tiny_lm.tokenizer import TokenizerConfig
from tiny_lm.training import TrainingConfig

KINDS: dict[str, type[Config]] = {
    "datasets": DatasetConfig,
    "tokenizers": TokenizerConfig,
    "training": TrainingConfig,
    "data": BinDataConfig,
    "profiles": Profile,
}
SHIPPED = sorted(shipped_configs().rglob("*.yaml"))

DOCUMENTED = {
    "datasets": ["tinystories", "swallow-code"],
    "tokenizers": ["tinystories-8k", "swallow-code-16k"],
    "models": ["gpt2-8k-2l", "gpt2-8k-2l-speed", "gpt2-8k-2l-enhanced", "gpt2-8k-1l-ultra", "llama3-16k"],
    "training": ["gpt2-8k", "gpt2-8k-speed", "gpt2-8k-enhanced", "gpt2-8k-quality"],
    "data": ["tinystories-8k", "tinystories-8k-speed", "tinystories-8k-enhanced"],
}


@config_dataclass
class Inner:
    width: int = 1


@config_dataclass
class Example(Config):
    folder: ClassVar[str] = "examples"

    size: int = Field(ge=1)
    rate: float = 0.5
    name: str | None = None
    flag: bool = False
    pair: tuple[float, float] = (0.9, 0.95)
    inner: Inner = Field(default_factory=Inner)


def load(text: str, tmp_path: Path, **overrides: object) -> Example:
    file = tmp_path / "example.yaml"
    file.write_text(text)
    return Example.from_yaml(file, overrides)


def test_values_keep_their_types_and_survive_a_round_trip(tmp_path: Path) -> None:
    config = load("size: 3\nrate: 3e-4\npair: [0, 1]\ninner: {width: 2}\n", tmp_path)
    assert (config.size, config.rate, config.pair, config.inner.width) == (3, 3e-4, (0.0, 1.0), 2)
    assert isinstance(config.pair[0], float)
    config.save(tmp_path / "again.yaml")
    assert Example.from_yaml(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("size: 3\nsise: 4", "unknown key 'sise'; did you mean 'size'?"),
        ("sise: 4", "unknown key 'sise'; did you mean 'size'?"),
        ("size: 3\ninner: {widht: 4}", "unknown key 'inner.widht'; did you mean 'width'?"),
        ("rate: 1.0", "the key 'size' is missing"),
        ("size: three", "size: input should be a valid integer (it is 'three')"),
        ("size: 3.0", "size: input should be a valid integer"),
        ("size: true", "size: input should be a valid integer"),
        ("size: 0", "size: input should be greater than or equal to 1 (it is 0)"),
        ("size: 3\nrate: '0.1'", "rate: input should be a valid number (it is '0.1')"),
        ("size: 3\nrate: .inf", "rate: "),
        ("size: 3\nflag: 1", "flag: input should be a valid boolean (it is 1)"),
        ("size: 3\npair: [1]", "pair: has too few elements (it is [1])"),
        ("size: 3\npair: 1", "pair: input should be a list, such as [1] (it is 1)"),
        ("size: 3\npair: [1, x]", "pair.1: input should be a valid number (it is 'x')"),
        ("size: 3\nname: 2020-01-01", "holds a value of an unsupported type"),
        ("size: 3\nsize: 4", "example.yaml:2:1: is not valid YAML (the key 'size' is given twice)"),
        ("size: &a 3\nrate: *a", "is not valid YAML (aliases are not supported)"),
        ("size: [", "is not valid YAML"),
        ("- size", "must hold keys and values"),
        ("", "must hold keys and values, but holds None"),
        ("1: 2", "is not valid YAML (the key 1 is not a string)"),
        ("a: !!python/object/apply:os.system [true]", "is not valid YAML"),
        ("a: " + "[" * 3000, "is not valid YAML"),
    ],
)
def test_a_mistake_is_one_line_that_names_file_key_and_value(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(text, tmp_path)
    assert message in str(caught.value)
    assert "example.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_value_that_may_be_of_two_types_is_told_of_both() -> None:
    message = r"^config: devices: input should be a valid integer or input should be 'auto' \(it is 'all'\)$"
    with pytest.raises(UserError, match=message):
        TrainingConfig.from_dict({"max_steps": 1, "learning_rate": 0.1, "devices": "all"})


def test_a_mistake_on_the_command_line_is_not_laid_to_the_file_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"example.yaml with --set: size: input should be a valid integer"):
        load("size: 3", tmp_path, size="x")


def test_files_that_are_no_text_or_too_large(tmp_path: Path) -> None:
    file = tmp_path / "example.yaml"
    file.write_bytes(b"size: \xff")
    with pytest.raises(UserError, match="is not UTF-8 text \\(byte 6\\)"):
        Example.from_yaml(file)
    file.write_text("size: 1\n#" + "x" * 2**20)
    with pytest.raises(UserError, match="larger than 1048576 bytes"):
        Example.from_yaml(file)


def test_overrides_win_and_reach_into_mappings(tmp_path: Path) -> None:
    overrides = parse_overrides(["a.rate=1e-3", "a.inner.width=7", "a.name=x"], ["a", "b"])
    config = load("size: 3\n", tmp_path, **overrides["a"])
    assert (config.rate, config.inner.width, config.name) == (1e-3, 7, "x")
    assert overrides["b"] == {}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rate=1", "the form is section.key=value"),
        ("model.rate", "the form is section.key=value"),
        ("modell.rate=1", "unknown section 'modell'; did you mean 'model'?"),
        ("model.rate=[", "is not valid YAML"),
    ],
)
def test_mistakes_in_overrides(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        parse_overrides([setting], ["model", "training"])


def test_a_config_is_found_by_path_by_name_and_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = shipped_configs() / "training" / "gpt2-8k.yaml"
    assert find_config("training", "gpt2-8k") == shipped
    assert find_config("training", "configs/training/gpt2-8k.yaml") == shipped
    own = tmp_path / "configs" / "training" / "gpt2-8k.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("max_steps: 1\nlearning_rate: 0.1\n")
    assert TrainingConfig.from_yaml("gpt2-8k").max_steps == 1
    with pytest.raises(UserError, match=r"gpt2-8x: no such training config; did you mean 'gpt2-8k'\?"):
        find_config("training", "gpt2-8x")
    with pytest.raises(UserError, match=r"elsewhere/gpt2-8k\.yaml: no such training config"):
        find_config("training", "elsewhere/gpt2-8k.yaml")


def load_shipped(path: Path) -> Config:
    kind = path.parent.name
    return load_model_config(path) if kind == "models" else KINDS[kind].from_yaml(path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_config_loads_and_says_the_same_when_dumped(path: Path) -> None:
    config = load_shipped(path)
    again = parse_yaml(config.to_yaml(), source="dump")
    kind = path.parent.name
    assert (model_config_from_dict(again) if kind == "models" else KINDS[kind].from_dict(again)) == config


def test_every_documented_config_is_there() -> None:
    present = {(path.parent.name, path.stem) for path in SHIPPED}
    assert {(kind, name) for kind, names in DOCUMENTED.items() for name in names} <= present


@pytest.mark.parametrize(
    ("profile", "model", "batch", "training"),
    [
        ("speed", (384, 2, 4, 1536, 256), (128, 256, 1), (500, 6e-4, 6e-5, 0.02, 50, 100)),
        ("enhanced", (512, 2, 4, 2048, 512), (80, 512, 2), (1000, 4e-4, 6e-5, 0.01, 50, 100)),
        ("baseline", (768, 2, 4, 3072, 1024), (56, 1024, 4), (1962, 3e-4, 6e-5, 0.01, 50, 100)),
        ("quality", (768, 2, 4, 3072, 1024), (56, 1024, 4), (5886, 3e-4, 3e-5, 0.005, 100, 200)),
    ],
)
def test_documented_values(
    profile: str, model: tuple[int, ...], batch: tuple[int, ...], training: tuple[float, ...]
) -> None:
    names = Profile.from_yaml(profile)
    network = load_model_config(names.model).to_dict()
    data, how = BinDataConfig.from_yaml(names.data), TrainingConfig.from_yaml(names.training)
    assert tuple(network[key] for key in ("d_model", "n_layers", "n_heads", "d_ff", "context_length")) == model
    assert network["vocab_size"] == 8192
    assert network["dropout"] == 0.1
    assert (data.batch_size, data.block_size, how.accumulate_grad_batches) == batch
    assert data.training_stride == data.block_size
    assert (data.dtype, data.num_workers, data.pin_memory, data.drop_last) == ("uint16", 4, True, True)
    assert training == (
        how.max_steps,
        how.learning_rate,
        how.min_lr,
        how.warmup_ratio,
        how.val_every_n_steps,
        how.save_every_n_steps,
    )
    assert (how.precision, how.ignore_index, how.weight_decay) == ("bf16-mixed", -100, 0.1)
    assert (how.betas, how.eps, how.grad_clip_norm, how.scheduler) == ((0.9, 0.95), 1e-8, 1.0, "cosine")
    assert how.system_metrics_every_n_steps == 5


def test_profiles_fit_together() -> None:
    for path in (shipped_configs() / "profiles").glob("*.yaml"):
        profile = Profile.from_yaml(path)
        model, data = load_model_config(profile.model), BinDataConfig.from_yaml(profile.data)
        TrainingConfig.from_yaml(profile.training)
        tokenizer = TokenizerConfig.from_yaml(profile.tokenizer)
        DatasetConfig.from_yaml(tokenizer.dataset_config)
        assert data.block_size <= model.context_length
        assert tokenizer.vocab_size is None or tokenizer.vocab_size <= model.vocab_size
        assert str(Path(data.train_path).parent) == tokenizer.tokenized_output_dir


def _mutate(text: str, seed: int) -> str:
    """Damage a YAML text in one to four places."""
    random_ = random.Random(seed)
    pieces = [
        "\n",
        ": ",
        "- ",
        "[",
        "]",
        "{",
        "}",
        "0",
        "-1",
        "1e999",
        "null",
        "~",
        "'",
        '"',
        "&a ",
        "*a",
        "!!int ",
        "\t",
        "é",
        "\0",
        "#",
        "2020-01-01",
        "0x1F",
        "1:2:3",
        "? ",
        "|",
        "%",
        "@",
        ".nan",
        "yes",
    ]
    for _ in range(random_.randint(1, 4)):
        at = random_.randrange(len(text) + 1)
        cut = random_.choice([0, 0, 1, 2, 5, 20])
        text = text[:at] + random_.choice(pieces) + text[at + cut :]
    return text


@settings(max_examples=400, deadline=None)
@given(path=st.sampled_from(SHIPPED), seed=st.integers(0, 2**32))
def test_no_mutation_of_a_config_ends_in_a_traceback(path: Path, seed: int) -> None:
    text = _mutate(path.read_text(), seed)
    kind = path.parent.name
    try:
        values = parse_yaml(text, source="mutated.yaml")
        if isinstance(values, dict):
            model_config_from_dict(values, source="m") if kind == "models" else KINDS[kind].from_dict(
                values, source="m"
            )
    except UserError as error:
        assert "\n" not in str(error)


@settings(max_examples=300, deadline=None)
@given(
    path=st.sampled_from(SHIPPED),
    values=st.dictionaries(
        st.text(max_size=8),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
            lambda children: (
                st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3)
            ),
            max_leaves=5,
        ),
        max_size=3,
    ),
    data=st.data(),
)
def test_no_value_in_any_place_ends_in_a_traceback(path: Path, values: dict[str, object], data: st.DataObject) -> None:
    original = load_shipped(path).to_dict()
    for key in data.draw(st.lists(st.sampled_from(sorted(original)), max_size=3)):
        original[key] = next(iter(values.values()), None)
    kind = path.parent.name
    try:
        merged = {**original, **values}
        model_config_from_dict(merged, source="m") if kind == "models" else KINDS[kind].from_dict(merged, source="m")
    except UserError as error:
        assert "\n" not in str(error)


def test_importing_the_loader_is_cheap() -> None:
    code = "import sys, tiny_lm.config; print('torch' in sys.modules, 'numpy' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]
