"""Exports to GGUF that need no llama.cpp: vocabulary, order of tensors, what is told and what is refused."""

import sys
from pathlib import Path

import pytest
import torch
from tiny_exports import FAMILIES, TrainedRun

from tiny_lm.errors import UserError
from tiny_lm.export.gguf import check_kinds, check_model, export_gguf, quantization_warnings
from tiny_lm.export.gguf_file import gguf_tensors, interleave_pairs, read_facts, tensor_type, write_gguf
from tiny_lm.export.gguf_vocabulary import TokenType, to_gguf_vocabulary
from tiny_lm.export.source import load_source
from tiny_lm.model import model_config_from_dict
from tiny_lm.tokenizer import BPETokenizer
from tiny_lm.tokenizer.bpe import TWO_DIGIT_PATTERN


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_holds_what_the_model_holds(family: str, trained_run: TrainedRun, tmp_path: Path) -> None:
    from gguf import GGUFReader

    source = load_source(trained_run(family, unused_rows=3).folder)
    vocabulary = to_gguf_vocabulary(source.tokenizer, source.config.vocab_size)
    write_gguf(source, vocabulary, tmp_path / "x.gguf", "F32")
    reader = GGUFReader(tmp_path / "x.gguf")
    written = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    expected = dict(gguf_tensors(source.config, source.model.state_dict()))
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name].reshape(expected[name].shape), expected[name]) for name in expected)
    assert "output.weight" not in written  # tied
    fields = {name: field.contents() for name, field in reader.fields.items()}
    prefix = fields["general.architecture"]
    assert fields[f"{prefix}.context_length"] == source.config.context_length
    assert fields[f"{prefix}.feed_forward_length"] == source.config.ffn_size
    assert fields["tokenizer.ggml.pre"] == "llama-bpe"
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.bos_token_id"] == source.tokenizer.bos_id
    assert fields["tokenizer.ggml.eos_token_id"] == source.tokenizer.eos_id
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(set(tokens)) == len(tokens) == source.config.vocab_size
    assert tokens[-3:] == [f"[PAD{source.tokenizer.vocab_size + i}]" for i in range(3)]


@pytest.mark.parametrize(("kind", "bits"), [("Q8_0", 8.5), ("Q5_1", 6), ("Q5_0", 5.5), ("Q4_1", 5), ("Q4_0", 4.5)])
def test_simple_types_need_no_llama_cpp(kind: str, bits: float, trained_run: TrainedRun, tmp_path: Path) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    source = load_source(trained_run("qwen3").folder)
    file = tmp_path / "x.gguf"
    write_gguf(source, to_gguf_vocabulary(source.tokenizer, source.config.vocab_size), file, kind)
    expected = dict(gguf_tensors(source.config, source.model.state_dict()))
    for tensor in GGUFReader(file).tensors:
        found = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).reshape(expected[tensor.name].shape)
        scale = float(expected[tensor.name].abs().max())
        torch.testing.assert_close(found, expected[tensor.name], rtol=0, atol=scale * 2.0 ** (1 - int(kind[1])))
        if tensor.name == "blk.0.ffn_up.weight":
            assert tensor.tensor_type.name == kind
            assert 8 * tensor.n_bytes / tensor.n_elements == bits
        if tensor.name == "token_embd.weight":  # which is the head as well
            assert tensor.tensor_type.name == "Q8_0"
    facts = read_facts(file)
    assert bits < facts.bits_per_weight < 9
    assert sum(facts.types.values()) == len(expected)


def test_rotary_pairs_are_laid_side_by_side() -> None:
    rows = torch.arange(16)  # two heads of 8
    assert interleave_pairs(rows, 2).tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    matrix = torch.randn(16, 5)
    assert torch.equal(interleave_pairs(matrix, 2)[1], matrix[4])


def test_token_types_say_what_may_be_shown(trained_run: TrainedRun, stories: list[str]) -> None:
    source = load_source(trained_run().folder)
    base = source.tokenizer.base
    tokenizer = BPETokenizer(base, {"bos": "<bos>", "eos": "<eos>", "think": "<think>"})
    vocabulary = to_gguf_vocabulary(tokenizer, tokenizer.vocab_size + 1)
    assert vocabulary.types[-4:] == [TokenType.CONTROL, TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNUSED]
    assert len(vocabulary.merges) == len(base) - 256
    spm = load_source(trained_run("llama3", "sentencepiece").folder)
    vocabulary = to_gguf_vocabulary(spm.tokenizer, spm.config.vocab_size)
    assert (vocabulary.model, vocabulary.types[0]) == ("llama", TokenType.UNKNOWN)
    assert vocabulary.types.count(TokenType.BYTE) == 256
    assert len(vocabulary.scores) == len(vocabulary.tokens)


def test_what_llama_cpp_has_no_tokenizer_for_is_refused(trained_run: TrainedRun, tmp_path: Path) -> None:
    source = load_source(trained_run("llama3", "char").folder)
    with pytest.raises(UserError, match=r"a char tokenizer cannot be written as GGUF.*or train with `type: BPE`"):
        to_gguf_vocabulary(source.tokenizer, source.config.vocab_size)
    base = load_source(trained_run().folder).tokenizer.base
    two_digits = BPETokenizer(base, {"bos": "<bos>", "eos": "<eos>"}, pattern=TWO_DIGIT_PATTERN)
    with pytest.raises(UserError, match=r"groups of two digits, which llama.cpp has no split for"):
        to_gguf_vocabulary(two_digits, two_digits.vocab_size)
    size = {"vocab_size": 64, "context_length": 8, "d_model": 32, "n_layers": 1, "n_heads": 2}
    with pytest.raises(UserError, match=r"llama.cpp's qwen3 has no biases"):
        check_model(model_config_from_dict({"architecture": "qwen3", "qkv_bias": True, **size}))


def test_rows_that_do_not_fit_are_told_beforehand() -> None:
    size = {"vocab_size": 500, "context_length": 8, "n_layers": 2, "n_heads": 4}
    wide = model_config_from_dict({"d_model": 256, **size})
    assert quantization_warnings(wide, ["Q4_K_M", "Q8_0"]) == []
    (line,) = quantization_warnings(model_config_from_dict({"d_model": 384, **size}), ["Q4_K_M", "Q6_K", "Q8_0"])
    assert line.startswith("7 tensors have rows of 384 numbers, not a multiple of 256, so Q4_K_M, Q6_K will be larger")
    assert "Q4_K: Q5_0, Q6_K: Q8_0" in line
    odd = model_config_from_dict({"d_model": 256, "d_ff": 100, **size})
    (line,) = quantization_warnings(odd, ["Q8_0"])
    assert line == "2 tensors have rows of 100 numbers, not a multiple of 32: they stay F16 in Q8_0"
    assert tensor_type("blk.0.ffn_down.weight", (256, 100), "Q8_0") == "F16"


def test_an_unknown_type_names_those_there_are() -> None:
    assert check_kinds(["f16", "Q4_K_M", "F16", ""]) == ["F16", "Q4_K_M"]
    with pytest.raises(UserError, match=r"Q9_9: unknown GGUF type; .* F32, F16, .* Q6_K"):
        check_kinds(["q9_9"])


def test_without_llama_cpp_the_extra_is_named(
    trained_run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(UserError, match=r"pip install 'tiny-lm\[llamacpp\]'"):
        export_gguf(load_source(trained_run().folder), tmp_path / "out", ["F16"])
    assert list(tmp_path.iterdir()) == []
