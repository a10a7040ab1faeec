"""Models that others made, or we exported, as runs of ours; made by the real transformers and tokenizers."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_exports import FAMILIES, TrainedRun, train_run

from tiny_lm.cli import main
from tiny_lm.data.tokenize import tokenize_corpus
from tiny_lm.errors import UserError
from tiny_lm.export.gguf import export_gguf
from tiny_lm.export.gguf_file import write_gguf
from tiny_lm.export.gguf_vocabulary import to_gguf_vocabulary
from tiny_lm.export.huggingface import export_huggingface
from tiny_lm.export.importing import import_model
from tiny_lm.export.modelfile import stop_strings
from tiny_lm.export.onnx import export_onnx
from tiny_lm.export.source import load_source
from tiny_lm.inference import TextGenerator
from tiny_lm.model.checkpoint import load_checkpoint_model
from tiny_lm.tokenizer import Tokenizer, load_tokenizer


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
    with pytest.raises(UserError, match="unsupported split"):
        import_model(foreign, tmp_path / "run")
    merges = whole["model"]["merges"]
    swapped = [merges[1], merges[0], *merges[2:]]
    change(file, pre_tokenizer=whole["pre_tokenizer"], model={**whole["model"], "merges": swapped})
    with pytest.raises(UserError, match="merges are not in the order"):
        import_model(foreign, tmp_path / "run")
    for key, value in {"dropout": 0.1, "continuing_subword_prefix": "##", "end_of_word_suffix": "</w>"}.items():
        change(file, model={**whole["model"], key: value})
        with pytest.raises(UserError, match=rf"sets {key} \("):
            import_model(foreign, tmp_path / "run")
    change(file, model={**whole["model"], "type": "Unigram"})
    with pytest.raises(UserError, match="not a byte-level BPE"):
        import_model(foreign, tmp_path / "run")
    file.unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
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


ROLES = {
    "only eos": {"eos_token": "<|im_end|>"},
    "one token for all": dict.fromkeys(("eos_token", "bos_token", "pad_token", "unk_token"), "<|im_end|>"),
    "eos and pad share": {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
    "bos that nothing adds": {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"},
    "bos that the template adds": {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"},
}


def foreign_llama(folder: Path, stories: list[str], roles: str) -> Path:
    """A Llama whose byte-level BPE has the special tokens that ``ROLES`` names."""
    import tokenizers
    import transformers

    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(stories, vocab_size=400, show_progress=False)
    trained.add_special_tokens(sorted(set(ROLES[roles].values())))
    if roles == "bos that the template adds":
        begin = ("<|im_start|>", trained.token_to_id("<|im_start|>"))
        template = tokenizers.processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[begin])
        trained._tokenizer.post_processor = template
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, **ROLES[roles])
    config = transformers.LlamaConfig(
        vocab_size=len(fast) + 3,
        max_position_embeddings=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    transformers.set_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("roles", ROLES)
def test_tokens_of_several_roles_and_a_missing_bos(roles: str, tmp_path: Path, stories: list[str]) -> None:
    import transformers

    theirs = foreign_llama(tmp_path / "theirs", stories, roles)
    run = import_model(theirs, tmp_path / "run").folder
    source = load_source(run)
    tokenizer = transformers.AutoTokenizer.from_pretrained(theirs)
    begin = [source.tokenizer.eos_id] if roles == "one token for all" else []
    for text in (*stories[:5], "<|im_end|> in a text"):
        plain = tokenizer.encode(text, split_special_tokens=True)
        assert source.tokenizer.encode_prompt(text) == [*begin, *plain]
    told = TextGenerator.from_path(run).generate("", 12, temperature=0)
    assert told == TextGenerator.from_path(theirs).generate("", 12, temperature=0)  # without an import
    assert [check for check in export_huggingface(source, tmp_path / "out") if not check.passed] == []
    back = load_source(import_model(tmp_path / "out", tmp_path / "back").folder)
    assert back.tokenizer.hash == source.tokenizer.hash
    # What transformers writes of it is read as well: it leaves out what only we know.
    saved = tmp_path / "saved"
    transformers.AutoTokenizer.from_pretrained(tmp_path / "out").save_pretrained(saved)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(saved)
    assert not (saved / "metadata.json").exists()
    assert TextGenerator.from_path(saved).generate("", 12, temperature=0) == told
    with pytest.raises(UserError, match="saved by another program: `tiny-lm import`"):
        load_tokenizer(saved)


@pytest.mark.llamacpp
@pytest.mark.parametrize("roles", ["only eos", "one token for all"])
def test_such_a_tokenizer_in_llama_cpp(roles: str, tmp_path: Path, stories: list[str]) -> None:
    source = load_source(import_model(foreign_llama(tmp_path / "theirs", stories, roles), tmp_path / "run").folder)
    files = export_gguf(source, tmp_path / "gguf", ["F32"])
    (begins,) = [check for check in files[0].checks if check.name == "beginning of a text"]
    assert begins.passed
    assert ("no special token" in begins.result) == (roles == "only eos")


@pytest.mark.deep
@pytest.mark.parametrize("roles", ["only eos", "one token for all"])
def test_such_a_tokenizer_in_other_formats(roles: str, tmp_path: Path, stories: list[str]) -> None:
    from gguf import GGUFReader

    source = load_source(import_model(foreign_llama(tmp_path / "theirs", stories, roles), tmp_path / "run").folder)
    assert all(check.passed for file in export_onnx(source, tmp_path / "onnx") for check in file.checks)
    write_gguf(source, to_gguf_vocabulary(source.tokenizer, source.config.vocab_size), tmp_path / "x.gguf", "F32")
    fields = {name: field.contents() for name, field in GGUFReader(tmp_path / "x.gguf").fields.items()}
    assert fields["tokenizer.ggml.add_bos_token"] is (roles == "one token for all")
    # llama.cpp takes token 11 for one that is missing.
    assert fields["tokenizer.ggml.bos_token_id"] == fields["tokenizer.ggml.eos_token_id"] == source.tokenizer.eos_id
    assert stop_strings(source) == ["<|im_end|>"]


def test_a_stream_without_bos(tmp_path: Path, stories: list[str]) -> None:
    source = load_source(import_model(foreign_llama(tmp_path / "theirs", stories, "only eos"), tmp_path / "r").folder)
    tokenize_corpus(source.tokenizer, {"train": stories[:9], "val": stories[9:12]}, tmp_path / "s", source="stories")
    ids = np.fromfile(tmp_path / "s" / "train.bin", np.uint16).tolist()
    assert ids.count(source.tokenizer.eos_id) == 9
    assert source.tokenizer.decode(ids) == "".join(stories[:9])


def test_damaged_parts_of_a_foreign_tokenizer_are_one_line(foreign: Path, tmp_path: Path) -> None:
    file = foreign / "tokenizer.json"
    whole = json.loads(file.read_text())
    end = whole["added_tokens"][-1]
    for values, problem in (
        ({"added_tokens": [{**end, "id": {}}]}, "added_tokens are not a list of different tokens"),
        ({"added_tokens": [end, end]}, "added_tokens are not a list of different tokens"),
        ({"added_tokens": {"a": 1}}, "added_tokens are not a list of different tokens"),
        ({"model": {**whole["model"], "merges": 3}}, "merges are not a list of pairs"),
        ({"model": {**whole["model"], "merges": [7]}}, "merges are not a list of pairs"),
        ({"model": {**whole["model"], "merges": [["a", None]]}}, "merges are not a list of pairs"),
        ({"model": {**whole["model"], "merges": ["ab"]}}, "merges are not a list of pairs"),
        ({"model": {**whole["model"], "vocab": {"a": 0}}}, "must follow the other tokens"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": 5}}, "unsupported split"),
    ):
        file.write_text(json.dumps({**whole, **values}))
        with pytest.raises(UserError, match=problem) as caught:
            import_model(foreign, tmp_path / "run")
        assert str(caught.value).startswith(str(file)), problem
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untied_head_in_every_export(family: str, tokenizer: Tokenizer, stories: list[str], tmp_path: Path) -> None:
    from gguf import GGUFReader

    run = train_run(family, 0, tokenizer, stories, tmp_path, steps=4, tie_word_embeddings=False)
    source = load_source(run.folder)
    embedding, head = source.model.token_emb.weight.detach(), source.model.lm_head.weight.detach()
    assert not torch.allclose(embedding, head, atol=1e-3)
    assert all(check.passed for check in export_huggingface(source, tmp_path / "hf"))
    loaded = load_source(import_model(tmp_path / "hf", tmp_path / "back").folder).model
    assert torch.equal(loaded.lm_head.weight, head)
    vocabulary = to_gguf_vocabulary(source.tokenizer, source.config.vocab_size)
    write_gguf(source, vocabulary, tmp_path / "x.gguf", "F32")
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "x.gguf").tensors}
    assert torch.equal(torch.tensor(tensors["output.weight"]), head)
    assert torch.equal(torch.tensor(tensors["token_embd.weight"]), embedding)


def test_an_untied_head_in_onnx(tokenizer: Tokenizer, stories: list[str], tmp_path: Path) -> None:
    run = train_run("llama3", 0, tokenizer, stories, tmp_path, steps=4, tie_word_embeddings=False)
    files = export_onnx(load_source(run.folder), tmp_path / "onnx")
    assert all(check.passed for file in files for check in file.checks)
    assert files[-1].facts.bits_per_weight < 16  # embedding and head have eight bits, too


@pytest.mark.llamacpp
@pytest.mark.parametrize("family", FAMILIES)
def test_an_untied_head_in_llama_cpp(family: str, tokenizer: Tokenizer, stories: list[str], tmp_path: Path) -> None:
    run = train_run(family, 0, tokenizer, stories, tmp_path, steps=4, tie_word_embeddings=False)
    files = export_gguf(load_source(run.folder), tmp_path / "gguf", ["F32", "Q8_0", "Q4_0"])
    assert all(check.passed for file in files for check in file.checks)
