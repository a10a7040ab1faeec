"""llama.cpp's own converter on our Hugging Face folder: what it makes of it, beside the GGUF file that we write."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_server import LLAMA_CPP
from tiny_exports import FAMILIES, TrainedRun

from tiny_lm.export.gguf_file import write_gguf
from tiny_lm.export.gguf_vocabulary import PRE_TOKENIZERS, to_gguf_vocabulary
from tiny_lm.export.huggingface import write_huggingface
from tiny_lm.export.llamacpp_engine import LlamaCppEngine
from tiny_lm.export.source import ExportSource, load_source
from tiny_lm.export.verify import OwnEngine, check_tokens
from tiny_lm.tokenizer import BPETokenizer

pytestmark = pytest.mark.llama_server

CONVERTER = LLAMA_CPP / "source" / "convert_hf_to_gguf.py"
NAMED_SPLIT = (
    "import sys; sys.path.insert(0, 'llama.cpp'); from conversion.base import TextModel; "
    "TextModel.get_vocab_base_pre = lambda *_: 'llama-bpe'; import convert_hf_to_gguf; convert_hf_to_gguf.main()"
)
"""The way around in docs/deployment.md: the converter knows a split only by a hash of ids of vocabularies it knows."""

# What each says in its own way; none of it changes what is computed.
ALWAYS_DIFFERENT = {
    "GGUF.kv_count",
    "general.name",
    "general.size_label",
    "general.tags",
    "general.sampling.temp",
    "general.sampling.top_k",
    "general.sampling.top_p",
    "tokenizer.ggml.add_sep_token",
    "tokenizer.ggml.eot_token_id",  # llama.cpp takes eos where it is missing
    "tokenizer.ggml.unknown_token_id",  # of a BPE that has all bytes, never used
}
DIFFERENT = {
    # The converter takes four times the width for granted, which no file of the folder can change.
    "gpt2": {"gpt2.feed_forward_length", "gpt2.attention.head_count_kv", "gpt2.vocab_size"},
    "smalllm": {"starcoder2.rope.dimension_count", "starcoder2.vocab_size"},
    "llama3": set[str](),
    "qwen3": {"qwen3.rope.dimension_count", "qwen3.vocab_size"},
}


def folder_of(source: ExportSource, folder: Path) -> Path:
    folder.mkdir()
    write_huggingface(source, folder)
    return folder


def convert(words: list[str], folder: Path, target: Path) -> "subprocess.CompletedProcess[str]":
    """Run the converter where it lies in a folder called llama.cpp, as a user has it."""
    if not CONVERTER.is_file():
        pytest.fail(f"{CONVERTER} is not there: make test-llama-server")
    (target.parent / "llama.cpp").symlink_to(CONVERTER.parent, target_is_directory=True)
    return subprocess.run(
        [sys.executable, *words, str(folder), "--outfile", str(target), "--outtype", "f32"],
        capture_output=True,
        text=True,
        cwd=target.parent,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=300,
        check=False,
    )


def read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return fields and tensors of a GGUF file by name."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor.data for tensor in reader.tensors}


def write_ours(source: ExportSource, file: Path) -> Path:
    write_gguf(source, to_gguf_vocabulary(source.tokenizer, source.config.vocab_size), file, "F32")
    return file


@pytest.mark.parametrize("family", FAMILIES)
def test_the_converter_writes_what_we_write(family: str, trained_run: TrainedRun, tmp_path: Path) -> None:
    source = load_source(trained_run(family, unused_rows=3).folder)
    assert isinstance(source.tokenizer, BPETokenizer)
    assert PRE_TOKENIZERS[source.tokenizer.pattern] == "llama-bpe"
    folder, converted = folder_of(source, tmp_path / "hf"), tmp_path / "converted.gguf"
    done = convert(["-c", NAMED_SPLIT], folder, converted)
    assert done.returncode == 0, done.stderr[-3000:]
    fields, tensors = read(converted)
    our_fields, our_tensors = read(write_ours(source, tmp_path / "ours.gguf"))
    assert tensors.keys() == our_tensors.keys()
    assert [name for name in tensors if not np.array_equal(tensors[name], our_tensors[name])] == []
    names = fields.keys() | our_fields.keys()
    different = {name for name in names if fields.get(name) != our_fields.get(name)}
    assert different - ALWAYS_DIFFERENT == DIFFERENT[family]
    assert fields["tokenizer.ggml.add_bos_token"] is True
    if family == "gpt2":
        assert fields["gpt2.feed_forward_length"] == 4 * source.config.d_model != source.config.ffn_size


def test_the_converter_does_not_know_a_vocabulary_trained_at_home(trained_run: TrainedRun, tmp_path: Path) -> None:
    """Shown so that the way around can go when this changes: the hash is of ids, which no file of the folder names."""
    folder = folder_of(load_source(trained_run("llama3").folder), tmp_path / "hf")
    done = convert([str(CONVERTER)], folder, tmp_path / "x.gguf")
    assert done.returncode != 0
    assert "BPE pre-tokenizer was not recognized" in done.stderr


def test_sentencepiece_of_a_llama_is_converted_as_it_is(trained_run: TrainedRun, tmp_path: Path) -> None:
    source = load_source(trained_run("llama3", "sentencepiece").folder)
    folder, converted = folder_of(source, tmp_path / "hf"), tmp_path / "converted.gguf"
    done = convert([str(CONVERTER)], folder, converted)
    assert done.returncode == 0, done.stderr[-3000:]
    fields, tensors = read(converted)
    our_fields, our_tensors = read(write_ours(source, tmp_path / "ours.gguf"))
    for name in ("tokens", "token_type", "add_space_prefix", "add_bos_token", "bos_token_id", "eos_token_id"):
        assert fields[f"tokenizer.ggml.{name}"] == our_fields[f"tokenizer.ggml.{name}"], name
    assert all(np.array_equal(tensors[name], our_tensors[name]) for name in our_tensors)
    engine = LlamaCppEngine(converted, source)
    checks = check_tokens(source, OwnEngine(source), engine)
    engine.close()
    assert [check.result for check in checks if not check.passed] == []
