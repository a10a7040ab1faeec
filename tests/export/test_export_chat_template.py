"""A chat template that lies beside a run's tokenizer goes wherever the model goes, and comes back."""

import json
import shutil
from pathlib import Path

import gguf
import pytest
from tiny_exports import TrainedRun
from transformers import AutoTokenizer

from tiny_lm.export.gguf_file import write_gguf
from tiny_lm.export.gguf_vocabulary import to_gguf_vocabulary
from tiny_lm.export.hub import allowed_files
from tiny_lm.export.huggingface import export_huggingface
from tiny_lm.export.importing import import_model
from tiny_lm.export.modelfile import modelfile
from tiny_lm.export.source import ExportSource, load_source
from tiny_lm.tokenizer.chat_template import read_chat_template

TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}|{% endfor %}"


@pytest.fixture
def chatty(trained_run: TrainedRun, tmp_path: Path) -> ExportSource:
    run = shutil.copytree(trained_run().folder, tmp_path / "chatty")
    (run / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
    return load_source(run)


def test_transformers_chats_by_it_and_it_comes_back(chatty: ExportSource, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_huggingface(chatty, out)
    told = AutoTokenizer.from_pretrained(out).apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert told == "<bos>user: Hi|"
    assert "chat_template.jinja" in [file.name for file in allowed_files(out)]  # the Hub gets it, too
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == TEMPLATE
    assert read_chat_template(import_model(out, tmp_path / "back").tokenizer) == TEMPLATE


def test_llama_cpp_and_ollama_find_it_in_the_file(chatty: ExportSource, tmp_path: Path) -> None:
    file = tmp_path / "chatty.gguf"
    write_gguf(chatty, to_gguf_vocabulary(chatty.tokenizer, chatty.config.vocab_size), file, "F32")
    assert gguf.GGUFReader(file).fields["tokenizer.chat_template"].contents() == TEMPLATE
    assert "TEMPLATE" not in modelfile(chatty, file.name)


def test_a_run_without_one_gets_none(trained_run: TrainedRun, tmp_path: Path) -> None:
    export_huggingface(load_source(trained_run().folder), tmp_path / "out")
    assert read_chat_template(tmp_path / "out") is None
