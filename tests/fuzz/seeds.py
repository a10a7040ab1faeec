"""Small real files to begin with: a run, its stream and tokenizers, an export's folder, corpora and request bodies."""

import gzip
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken
import torch
from safetensors.torch import save_file

from tiny_lm.data import BinDataConfig
from tiny_lm.data.tokenize import tokenize_corpus
from tiny_lm.dataset.stories import generate_stories
from tiny_lm.model import build_model, model_config_from_dict
from tiny_lm.model.huggingface import to_huggingface_config
from tiny_lm.model.huggingface_weights import to_huggingface_state
from tiny_lm.runs import Run
from tiny_lm.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from tiny_lm.training import TrainingConfig
from tiny_lm.training.fit import train

ROOT = Path(__file__).parent.parent.parent

MODEL = {"vocab_size": 320, "context_length": 16, "d_model": 8, "n_layers": 1, "n_heads": 1}

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '' }}{% endif %}"
)


def write_seeds(folder: Path) -> None:
    """Write the files that all readers begin with; a minute at most, done once for all of them."""
    torch.manual_seed(0)
    stories = list(generate_stories(60, seed=1))
    shutil.copytree(ROOT / "configs", folder / "configs")
    tokenizers: dict[str, Tokenizer] = {}
    for kind, size in (("BPE", 320), ("char", None), ("sentencepiece", 320)):
        config = TokenizerConfig(
            name=kind, type=kind, dataset_config="stories", **({"vocab_size": size} if size else {})
        )
        tokenizers[kind.lower()] = train_tokenizer(config, stories)
        tokenizers[kind.lower()].save(folder / "tokenizers" / kind.lower())
    stream = folder / "stream"
    tokenize_corpus(tokenizers["bpe"], {"train": stories[:50], "val": stories[50:]}, stream, source="stories")
    _write_run(folder / "run", stream)
    _write_export(folder / "export", tokenizers["bpe"])
    _write_pickle(folder / "pickle" / "tokenizer.pkl", tokenizers["bpe"])
    _write_corpora(folder / "corpora", stories[:6])
    _write_requests(folder / "requests")
    _write_texts(folder / "texts")


def _write_run(folder: Path, stream: Path) -> None:
    train(
        model_config_from_dict(MODEL, source="fuzz"),
        TrainingConfig(
            max_steps=4,
            learning_rate=1e-3,
            precision="32-true",
            val_every_n_steps=2,
            save_every_n_steps=2,
            log_every_n_steps=1,
        ),
        BinDataConfig(
            train_path=str(stream / "train.bin"), val_path=str(stream / "val.bin"), block_size=16, batch_size=2
        ),
        Run(folder),
    )
    words = ["eval", str(folder), "--max-new-tokens", "4", "--samples", "2"]
    subprocess.run(
        [sys.executable, "-c", "from tiny_lm.cli import main; main()", *words], cwd=folder.parent, check=True
    )
    for name in ("run.json", "metrics.jsonl", "evaluation.json"):
        _make_repeatable(folder / name)


def _make_repeatable(file: Path) -> None:
    """Replace what another run or machine would measure, so that a number stands for the same mutant everywhere."""
    text = re.sub(r"\d+\.\d+(e-?\d+)?(?=[,\s}\]])", "1.5", file.read_text(encoding="utf-8"))
    text = re.sub(r'"(processor|platform|started|device)": "[^"]*"', r'"\1": "x"', text)
    file.write_text(text, encoding="utf-8")


def _write_export(folder: Path, tokenizer: Tokenizer) -> None:
    """Write a folder as transformers lays it out, without the checks of a real export, which take half a minute."""
    config = model_config_from_dict({"architecture": "llama3", **MODEL, "n_kv_heads": 1}, source="fuzz")
    specials = {token.role: token for token in tokenizer.specials}
    folder.mkdir(parents=True)
    content = to_huggingface_config(config, bos_id=specials["bos"].id, eos_id=specials["eos"].id, pad_id=None)
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    save_file(to_huggingface_state(config, build_model(config).state_dict()), folder / "model.safetensors")
    shutil.copy(folder.parent / "tokenizers" / "bpe" / "tokenizer.json", folder)
    names = {f"{role}_token": specials[role].text for role in ("bos", "eos")}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, "chat_template": CHAT_TEMPLATE}), "utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _write_pickle(path: Path, tokenizer: Any) -> None:
    path.parent.mkdir()
    ranks = {bytes([number]): number for number in range(256)}
    encoding = tiktoken.Encoding(
        "old",
        pat_str=tokenizer.pattern,
        mergeable_ranks=ranks,
        special_tokens={token.text: 256 + number for number, token in enumerate(tokenizer.specials)},
    )
    path.write_bytes(pickle.dumps(encoding))


def _write_corpora(folder: Path, stories: list[str]) -> None:
    folder.mkdir()
    text = "\n<|endoftext|>\n".join(stories).encode()
    lines = "".join(json.dumps({"text": story}) + "\n" for story in stories).encode()
    files = {"a.txt": text, "a.jsonl": lines, "a.json": lines, "a.csv": b"id,text\n" + b"".join(
        b'%d,"%s"\n' % (number, story.replace('"', '""').encode()) for number, story in enumerate(stories)
    )}  # fmt: skip
    for name, data in files.items():
        (folder / name).write_bytes(data)
        (folder / f"{name}.gz").write_bytes(gzip.compress(data, mtime=0))
    pq.write_table(pa.table({"text": stories}), folder / "a.parquet")


def _write_requests(folder: Path) -> None:
    folder.mkdir()
    chat = {"model": "fuzz", "messages": [{"role": "user", "content": "Once"}], "seed": 1}
    bodies = {
        "v1.completions": {
            "model": "fuzz", "prompt": ["Once", "upon"], "max_tokens": 3, "temperature": 0.7, "top_p": 0.9, "n": 1,
            "logprobs": 2, "stop": ["."], "logit_bias": {"5": -1}, "presence_penalty": 0.1, "echo": True, "seed": 1,
            "stream": False, "stream_options": None,
        },
        "v1.chat.completions": {
            **chat, "max_completion_tokens": 3, "logprobs": True, "top_logprobs": 2, "stream": True,
            "stream_options": {"include_usage": True},
        },
        "api.generate": {
            "model": "fuzz", "prompt": "Once", "stream": False, "raw": False,
            "options": {"num_predict": 3, "temperature": 0.5, "stop": ["."], "top_k": 5, "seed": 1, "num_ctx": None},
        },
        "api.chat": {"model": "fuzz", "messages": chat["messages"], "stream": False, "options": {"num_predict": 3}},
        "api.show": {"model": "fuzz", "verbose": True},
    }  # fmt: skip
    for name, body in bodies.items():
        (folder / f"{name}.json").write_text(json.dumps(body), encoding="utf-8")


def _write_texts(folder: Path) -> None:
    folder.mkdir()
    grades = {"grammar": 7, "creativity": 6, "consistency": 5, "plot": 4}
    (folder / "grades.txt").write_text(f"I think about it {{.\n```json\n{json.dumps(grades)}\n```\n", "utf-8")
    answer = {"choices": [{"message": {"role": "assistant", "content": json.dumps(grades)}}]}
    (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")
    (folder / "host.txt").write_text("[::1]:8000\nlocalhost:8000\n127.0.0.1\nmy.host.example:80\n", "utf-8")
    (folder / "prompts.txt").write_text("Once upon a time\nOne day,\\n a fox\n", "utf-8")
    (folder / "settings.txt").write_text("data.batch_size=3\ntraining.max_steps=4\nmodel.dropout=0.1\n", "utf-8")
