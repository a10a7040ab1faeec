"""What the tests of exports share: the families, small, and how their runs are trained."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tiny_lm.cli import main
from tiny_lm.data import BinDataConfig
from tiny_lm.data.tokenize import tokenize_corpus
from tiny_lm.model import model_config_from_dict
from tiny_lm.runs import Run
from tiny_lm.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from tiny_lm.training import TrainingConfig
from tiny_lm.training.fit import train

FAMILIES = {
    "gpt2": {"n_heads": 2, "d_ff": 160},
    "smalllm": {"n_heads": 2, "d_ff": 96, "qkv_bias": False},
    "llama3": {"n_heads": 4, "n_kv_heads": 2, "ffn_hidden_dim": 96},
    "qwen3": {"n_heads": 4, "n_kv_heads": 2, "ffn_hidden_dim": 96, "head_dim": 32},
}
TrainedRun = Callable[..., Run]


def make_tokenizer(kind: str, stories: list[str], bpe: Tokenizer) -> Tokenizer:
    if kind == "BPE":
        return bpe
    size = None if kind == "char" else 512
    return train_tokenizer(TokenizerConfig(name="t", type=kind, vocab_size=size, dataset_config="s"), stories)


def train_run(
    family: str,
    unused_rows: int,
    tokenizer: Tokenizer,
    stories: list[str],
    folder: Path,
    *,
    steps: int = 60,
    **shape: int,
) -> Run:
    """Train for a moment; ``shape`` replaces values of the family's config."""
    tokenize_corpus(tokenizer, {"train": stories[:280], "val": stories[280:]}, folder / "stream", source="stories")
    size = {"context_length": 96, "d_model": 64, "n_layers": 2, "vocab_size": tokenizer.vocab_size + unused_rows}
    run = Run(folder / "runs" / f"{family}-{tokenizer.kind}")
    train(
        model_config_from_dict({"architecture": family, **size, **FAMILIES[family], **shape}),
        TrainingConfig(
            max_steps=steps,
            learning_rate=5e-3,
            precision="32-true",
            val_every_n_steps=steps,
            save_every_n_steps=steps,
        ),
        BinDataConfig(
            train_path=str(folder / "stream" / "train.bin"),
            val_path=str(folder / "stream" / "val.bin"),
            block_size=64,
            batch_size=4,
        ),
        run,
    )
    return run


def run_main(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    """Run ``tiny-lm`` in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["tiny-lm", *map(str, words)])
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0)


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, stories: list[str], tokenizer: Tokenizer) -> TrainedRun:
    """Return the run of a family and a kind of tokenizer; each is trained once."""
    made: dict[tuple[str, str, int], Run] = {}

    def get(family: str = "llama3", kind: str = "BPE", unused_rows: int = 0) -> Run:
        key = (family, kind, unused_rows)
        if key not in made:
            made[key] = train_run(
                family, unused_rows, make_tokenizer(kind, stories, tokenizer), stories, new_folder(key)
            )
        return made[key]

    def new_folder(key: tuple[str, str, int]) -> Path:
        return tmp_path_factory.mktemp("-".join(map(str, key)))

    return get
