"""A run that begins with the weights of another model: of a run, a checkpoint, a Hugging Face folder."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import FAMILIES, losses, model, training

from tiny_lm.data import BinDataConfig
from tiny_lm.data.bin.data_module import BinTokenDataModule
from tiny_lm.data.tokenize import tokenize_corpus
from tiny_lm.errors import UserError
from tiny_lm.evaluation.report.artifacts import load_artifacts
from tiny_lm.evaluation.report.overview import recipe_rows
from tiny_lm.export.huggingface import write_huggingface
from tiny_lm.export.importing import import_model
from tiny_lm.export.source import load_source
from tiny_lm.model import Transformer
from tiny_lm.model.checkpoint import load_checkpoint_model, read_checkpoint
from tiny_lm.model.huggingface_folder import load_huggingface_model
from tiny_lm.runs import Run
from tiny_lm.tokenizer import TokenizerConfig, load_tokenizer, train_tokenizer
from tiny_lm.training.fit import TrainingResult, train

Fit = Callable[..., TrainingResult]


def loss_of_first_batch(network: Transformer, data: BinDataConfig) -> float:
    x, y = next(iter(BinTokenDataModule(data, seed=training().seed).train_dataloader()))
    with torch.no_grad():
        return float(F.cross_entropy(network(x).flatten(0, 1), y.flatten()))


@pytest.fixture
def taught(fit: Fit, tmp_path: Path) -> Callable[..., Run]:
    """Train a model of a family for a moment."""

    def make(family: str) -> Run:
        run = Run(tmp_path / "taught" / family)
        fit(run=run, config=model(family, dropout=0.0), max_steps=30, learning_rate=1e-2, val_every_n_steps=30)
        return run

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_goes_on_from_a_hugging_face_folder(
    family: str,
    taught: Callable[..., Run],
    fit: Fit,
    run: Run,
    data_config: Callable[..., BinDataConfig],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "exported"
    folder.mkdir()
    write_huggingface(load_source(taught(family).folder), folder)
    network, config = load_huggingface_model(folder)
    expected = loss_of_first_batch(network, data_config())
    assert expected < 5.5  # it has learned: a fresh one has ln 512, which is 6.24
    fit(config=config, max_steps=150, learning_rate=1e-2, val_every_n_steps=150, init_from=str(folder))
    curve = losses(run)
    assert curve[1] == pytest.approx(expected, abs=1e-5)
    assert sum(curve[step] for step in range(141, 151)) / 10 < sum(curve[step] for step in range(1, 11)) / 10 - 0.15
    assert run.read_metadata()["init_from"] == {"path": str(folder)}
    assert ("Initial weights", str(folder)) in recipe_rows(load_artifacts(run))
    checkpoint = read_checkpoint(run.last_checkpoint)
    assert checkpoint["global_step"] == 150
    assert len(checkpoint["optimizer_states"]) == 1


def test_an_imported_run_and_a_checkpoint_begin_alike(
    taught: Callable[..., Run], fit: Fit, data_config: Callable[..., BinDataConfig], tmp_path: Path
) -> None:
    quiet, origin = model("gpt2", dropout=0.0), taught("gpt2")
    imported = import_model(origin.folder, tmp_path / "imported")
    expected = loss_of_first_batch(load_checkpoint_model(origin.best_checkpoint).model, data_config())
    for number, (source, step) in enumerate(
        [(origin.folder, 30), (origin.step_checkpoint(30), 30), (imported.folder, 0)]
    ):
        begun = Run(tmp_path / f"begun-{number}")
        fit(run=begun, config=quiet, max_steps=1, init_from=str(source))
        assert losses(begun)[1] == pytest.approx(expected, abs=1e-5)
        assert begun.read_metadata()["init_from"] == {"path": str(source), "step": step}


def test_a_resumed_run_does_not_read_it_again(
    taught: Callable[..., Run], fit: Fit, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet, origin = model("gpt2", dropout=0.0), taught("gpt2")
    whole = Run(tmp_path / "whole")
    fit(run=whole, config=quiet, init_from=str(origin.folder))
    fit(config=quiet, init_from=str(origin.folder))
    shutil.rmtree(origin.folder)
    fit(config=quiet, init_from=str(origin.folder), resume_from=run.step_checkpoint(8))
    assert losses(run) == losses(whole)
    assert run.read_metadata()["init_from"]["path"] == str(origin.folder)
    fit(config=quiet, max_steps=14, init_from="elsewhere", resume_from=run.last_checkpoint)
    assert '-> "elsewhere": ignored: a resumed run has its own weights' in capsys.readouterr().err
    assert math.isfinite(losses(run)[14])


def test_the_chat_template_goes_on_with_the_model(
    taught: Callable[..., Run], fit: Fit, data_config: Callable[..., BinDataConfig], tmp_path: Path
) -> None:
    quiet, origin, exported = model("gpt2", dropout=0.0), taught("gpt2"), tmp_path / "exported"
    template = origin.tokenizer / "chat_template.jinja"
    template.write_text("theirs: {{ messages }}")
    exported.mkdir()
    write_huggingface(load_source(origin.folder), exported)
    for number, source in enumerate([origin.folder, origin.step_checkpoint(30), exported]):
        begun = Run(tmp_path / f"begun-{number}")
        fit(run=begun, config=quiet, max_steps=1, init_from=str(source))
        assert load_tokenizer(begun.tokenizer).chat_template == "theirs: {{ messages }}"
    # one that was put beside the run since stays when the run goes on
    (begun.tokenizer / "chat_template.jinja").write_text("mine: {{ messages }}")
    fit(run=begun, config=quiet, max_steps=2, init_from=str(exported), resume_from=begun.last_checkpoint)
    assert load_tokenizer(begun.tokenizer).chat_template == "mine: {{ messages }}"
    # and one that lies beside the tokenizer of the streams is nearer to the run than that of the first weights
    stream = shutil.copytree(Path(data_config().train_path).parent, tmp_path / "stream")
    (stream / "tokenizer" / "chat_template.jinja").write_text("ours: {{ messages }}")
    own = BinDataConfig(str(stream / "train.bin"), str(stream / "val.bin"), block_size=32, batch_size=4)
    last = Run(tmp_path / "last")
    train(quiet, training(max_steps=1, init_from=str(origin.folder)), own, last)
    assert load_tokenizer(last.tokenizer).chat_template == "ours: {{ messages }}"


def test_another_model_is_refused(taught: Callable[..., Run], fit: Fit, run: Run) -> None:
    origin = str(taught("llama3").folder)
    for config, told in [
        (model("qwen3"), "has architecture llama3, but the model config has qwen3"),
        (model("llama3", vocab_size=520), "has vocab_size 512, but the model config has 520"),
        (model("llama3", n_layers=3), "has n_layers 2, but the model config has 3"),
        (model("llama3", n_kv_heads=1), "has kv_heads 2, but the model config has 1"),
        (model("llama3", rope_theta=500.0), "has rope_theta 10000.0, but the model config has 500.0"),
    ]:
        with pytest.raises(UserError, match=f"{origin}: {told}; they must match"):
            fit(config=config, init_from=origin)
    assert not run.folder.exists()
    # what no weight depends on may differ
    fit(config=model("llama3", dropout=0.2, context_length=64), max_steps=1, init_from=origin)
    learned = str(taught("gpt2").folder)
    with pytest.raises(UserError, match="has context_length 32, but the model config has 64"):
        fit(config=model("gpt2", context_length=64), run=Run(run.folder.with_name("other")), init_from=learned)


def test_another_tokenizer_and_what_is_no_model_are_refused(
    taught: Callable[..., Run], stories: list[str], run: Run, tmp_path: Path
) -> None:
    config = TokenizerConfig(name="other", vocab_size=512, dataset_config="stories")
    other = train_tokenizer(config, [story.upper() for story in stories])
    tokenize_corpus(other, {"train": stories[:200], "val": stories[280:]}, tmp_path / "stream", source="stories")
    data = BinDataConfig(
        train_path=str(tmp_path / "stream" / "train.bin"),
        val_path=str(tmp_path / "stream" / "val.bin"),
        block_size=32,
        batch_size=4,
    )
    (tmp_path / "empty").mkdir()
    for source, told in [
        (taught("gpt2").folder, "tokenizer does not match the token streams.*tokenize --tokenizer"),
        (tmp_path / "empty", "is neither a run folder nor a model in Hugging Face's layout"),
        (tmp_path / "nowhere", "no such run folder"),
        (tmp_path / "nowhere.ckpt", "no such checkpoint"),
    ]:
        with pytest.raises(UserError, match=f"{source}.*{told}"):
            train(model("gpt2", dropout=0.0), training(init_from=str(source)), data, run)
    assert not run.folder.exists()
