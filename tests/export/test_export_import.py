"""Models that others made, or we exported, as runs of ours; made by the real transformers and tokenizers."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_exports import FAMILIES, TrainedRun

from tiny_lm.cli import main
from tiny_lm.errors import UserError
from tiny_lm.export.huggingface import export_huggingface
from tiny_lm.export.importing import import_model
from tiny_lm.export.source import load_source
from tiny_lm.inference import TextGenerator
from tiny_lm.model.checkpoint import load_checkpoint_model


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_comes_back_as_the_same_run(family: str, trained_run: TrainedRun, tmp_path: Path) -> None:
    source = load_source(trained_run(family).folder)
    export_huggingface(source, tmp_path / "out")
    run = import_model(tmp_path / "out", tmp_path / "back")
    ids = torch.tensor([source.validation.ids[:90]])
    loaded = load_checkpoint_model(run.last_checkpoint)
    with torch.no_grad():
        assert torch.equal(loaded.model(ids), source.model(ids))
    assert load_source(run.folder).tokenizer.hash == source.tokenizer.hash
    told = TextGenerator.from_run(run.folder).generate("Once", 20, temperature=0)
    assert told == TextGenerator.from_run(trained_run(family).folder).generate("Once", 20, temperature=0)


def test_a_run_of_ours_and_the_other_tokenizers(trained_run: TrainedRun, tmp_path: Path) -> None:
    for kind in ("sentencepiece", "char"):
        source = load_source(trained_run("llama3", kind).folder)
        run = import_model(trained_run("llama3", kind).folder, tmp_path / kind)
        assert load_source(run.folder).tokenizer.hash == source.tokenizer.hash


@pytest.fixture
def foreign(tmp_path: Path, stories: list[str]) -> Path:
    """A GPT-2 whose tokenizer the tokenizers library trained and transformers saved."""
    import transformers
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(stories, vocab_size=400, show_progress=False)
    trained.add_special_tokens(["<|endoftext|>"])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    config = transformers.GPT2Config(
        vocab_size=len(fast), n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=400, eos_token_id=400
    )
    folder = tmp_path / "foreign"
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def test_a_model_of_others(foreign: Path, tmp_path: Path, stories: list[str]) -> None:
    import transformers

    source = load_source(import_model(foreign, tmp_path / "run").folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(foreign)
    for text in (*stories[:20], "  two  spaces\n\n12345 it's 😀 漢字"):
        assert source.tokenizer.encode(text) == tokenizer.encode(text, add_special_tokens=False)
    assert source.tokenizer.bos_id == source.tokenizer.eos_id == 400
    model = transformers.AutoModelForCausalLM.from_pretrained(foreign, dtype=torch.float32).eval()
    ids = torch.tensor([source.tokenizer.encode(stories[0])[:60]])
    with torch.no_grad():
        torch.testing.assert_close(source.model(ids), model(ids).logits, rtol=0, atol=1e-5)


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_what_would_yield_other_ids_is_refused(foreign: Path, tmp_path: Path) -> None:
    file = foreign / "tokenizer.json"
    whole = json.loads(file.read_text())
    change(file, normalizer={"type": "NFC"})
    with pytest.raises(UserError, match="normalizes text"):
        import_model(foreign, tmp_path / "run")
    change(file, normalizer=None, pre_tokenizer={"type": "Whitespace"})
    with pytest.raises(UserError, match="splits text in a way that tiny-lm does not"):
        import_model(foreign, tmp_path / "run")
    merges = whole["model"]["merges"]
    swapped = [merges[1], merges[0], *merges[2:]]
    change(file, pre_tokenizer=whole["pre_tokenizer"], model={**whole["model"], "merges": swapped})
    with pytest.raises(UserError, match="merges are not in the order"):
        import_model(foreign, tmp_path / "run")
    change(file, model={**whole["model"], "type": "Unigram"})
    with pytest.raises(UserError, match="is no byte-level BPE"):
        import_model(foreign, tmp_path / "run")
    file.unlink()
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        import_model(foreign, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for code, words in ((0, "runs/foreign-imported\n"), (2, "")):
        monkeypatch.setattr(sys, "argv", ["tiny-lm", "import", "foreign"])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert (exit_.value.code or 0) == code
        captured = capsys.readouterr()
        assert captured.out == words
    assert "holds files already" in captured.err
