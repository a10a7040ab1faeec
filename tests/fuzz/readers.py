"""Every reader of a file or body that others may have written, and what it reads."""

import asyncio
import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny_lm.config import parse_overrides
from tiny_lm.errors import UserError

Read = Callable[[Path], object]


@dataclass(frozen=True)
class Reader:
    """One reader.

    Attributes:
        targets: patterns below the folder of the seeds; one file at a time becomes a mutant.
        open: makes the function that reads the mutant, at its place beside the files that stay whole.
        kind: ``json``, ``yaml`` or ``binary``: which mutations fit.
        seconds: most time for one mutant.
        share: part of the mutants that it reads; below 1 for a reader that takes a second for each.
    """

    targets: tuple[str, ...]
    open: Callable[[Path], Read]
    kind: str = "json"
    seconds: float = 20.0
    share: float = 1.0


def _plain(read: Read) -> Callable[[Path], Read]:
    return lambda _: read


# --- configs ---------------------------------------------------------------------------------------------------------


def _read_config(path: Path) -> None:
    from tiny_lm.data import BinDataConfig
    from tiny_lm.dataset import DatasetConfig
    from tiny_lm.model import load_model_config, num_parameters
    from tiny_lm.profile import Profile
    from tiny_lm.tokenizer import TokenizerConfig
    from tiny_lm.training import TrainingConfig

    if path.parent.name == "models":
        num_parameters(load_model_config(path))
        return
    kinds: dict[str, Any] = {
        "data": BinDataConfig, "datasets": DatasetConfig, "profiles": Profile, "tokenizers": TokenizerConfig,
        "training": TrainingConfig,
    }  # fmt: skip
    config = kinds[path.parent.name].from_yaml(path)
    config.from_dict(config.to_dict())
    config.to_yaml()


def _read_settings(path: Path) -> None:
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(UserError):
            parse_overrides([line], ["data", "model", "training"])


# --- tokenizers ------------------------------------------------------------------------------------------------------


def _use_tokenizer(tokenizer: Any) -> None:
    ids = tokenizer.encode("Once upon a time, a fox.\n")
    tokenizer.decode(ids)
    tokenizer.decode(range(min(tokenizer.vocab_size, 50)))


def _read_tokenizer(path: Path) -> None:
    from tiny_lm.tokenizer import load_tokenizer

    _use_tokenizer(load_tokenizer(path.parent))


def _read_foreign_tokenizer(path: Path) -> None:
    from tiny_lm.tokenizer.huggingface_import import load_huggingface_tokenizer

    _use_tokenizer(load_huggingface_tokenizer(path.parent))


def _read_pickle(path: Path) -> None:
    from tiny_lm.tokenizer.pickle_import import import_pickled_tokenizer

    _use_tokenizer(import_pickled_tokenizer(path))


def _open_chat_template(seeds: Path) -> Read:
    from tiny_lm.serving.chat import Message, load_chat_template
    from tiny_lm.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(seeds / "tokenizers" / "bpe")

    def read(path: Path) -> None:
        template = load_chat_template(path.parent, tokenizer)
        if template is None:
            return
        try:
            asyncio.run(template.encode([Message("user", "Hello")]))
        finally:
            template.close()

    return read


# --- weights, streams and runs ---------------------------------------------------------------------------------------


def _read_checkpoint(path: Path) -> None:
    import torch

    from tiny_lm.model.checkpoint import load_checkpoint_model, read_checkpoint

    read_checkpoint(path, whole=True)
    loaded = load_checkpoint_model(path)
    with torch.inference_mode():
        loaded.model(torch.zeros(1, 4, dtype=torch.long))


def _read_unchecked_checkpoint(path: Path) -> None:
    from tiny_lm.model.checkpoint import load_checkpoint_model

    load_checkpoint_model(path)


def _read_huggingface_folder(path: Path) -> None:
    import torch

    from tiny_lm.model.huggingface_folder import load_huggingface_model

    model, _ = load_huggingface_model(path.parent)
    with torch.inference_mode():
        model(torch.zeros(1, 4, dtype=torch.long))


def _read_stream(path: Path) -> None:
    from tiny_lm.data import BinDataConfig
    from tiny_lm.data.bin.dataset import BinTokenDataset
    from tiny_lm.data.bin.stream import open_stream, read_in_order

    names = {"train_path": str(path.parent / "train.bin"), "val_path": str(path.parent / "val.bin")}
    config = BinDataConfig(**names, block_size=16, batch_size=2)
    stream = open_stream(config.train_path, config)
    dataset = BinTokenDataset(stream, config)
    dataset[[0, len(dataset) - 1]]
    next(read_in_order(stream, 64))


def _read_run(path: Path) -> None:
    """Open the run whose file this is, as commands do, and write its report, which reads all of it."""
    from tiny_lm.evaluation.report.page import write_report
    from tiny_lm.runs import mean_over_time, open_run, read_metrics

    run = open_run(path.parent if path.parent.name == "run" else path.parent.parent)
    run.read_metadata()
    if path == run.metrics:
        mean_over_time(read_metrics(path), "tokens_per_sec")
    write_report(run)


def _read_plots(path: Path) -> None:
    from tiny_lm.evaluation.plots import plot_run
    from tiny_lm.runs import Run, read_metrics

    plot_run(Run(path.parent), read_metrics(path))


def _truncate_samples(path: Path) -> None:
    from tiny_lm.training.callbacks.samples import truncate_samples

    truncate_samples(path, 2)


# --- text ------------------------------------------------------------------------------------------------------------


def _read_corpus(path: Path) -> None:
    from tiny_lm.dataset import DatasetConfig, iter_documents

    config = DatasetConfig(name=str(path), source="local")
    for errors in ("strict", "replace"):
        with contextlib.suppress(UserError):
            for _ in iter_documents(config, "train", errors=errors):  # type: ignore[arg-type]
                pass


def _read_prompts(path: Path) -> None:
    from tiny_lm.cli.generate import _read_prompts as read

    read(path)


def _read_judge_answer(path: Path) -> None:
    from tiny_lm.evaluation.judge import _content, _message, parse_grades

    body = path.read_bytes()
    _message(body.decode("utf-8", "replace"))
    with contextlib.suppress(ValueError):  # what its caller catches
        parse_grades(_content(body))
    with contextlib.suppress(ValueError):
        parse_grades(body.decode("utf-8", "replace"))


def _read_files_to_push(path: Path) -> None:
    from tiny_lm.export.hub import allowed_files

    allowed_files(path.parent)


# --- the server ------------------------------------------------------------------------------------------------------


def _read_hosts(path: Path) -> None:
    from tiny_lm.serving.middleware import host_name, hosts_of

    for line in path.read_bytes().decode("latin-1").split("\n"):
        if host_name(line) is not None:
            hosts_of(line, ["localhost"])


def _open_server(seeds: Path) -> Read:
    """Serve the run of the seeds inside this process; an answer of 500 or above is a crash, but 503 says what it is."""
    import httpx

    from tiny_lm.serving.app import create_app
    from tiny_lm.serving.limits import Limits
    from tiny_lm.serving.models import load_model

    limits = Limits(max_tokens=4, seconds=15)
    app = create_app([load_model("fuzz", seeds / "run", limits)], limits=limits)
    loop = asyncio.new_event_loop()
    lifespan = app.router.lifespan_context(app)
    loop.run_until_complete(lifespan.__aenter__())
    client = httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app),
        base_url="http://127.0.0.1",
        headers={"content-type": "application/json"},
    )

    def read(path: Path) -> None:
        route = "/" + path.stem.replace(".", "/").replace("v1/chat/", "v1/chat/")
        answer = loop.run_until_complete(client.post(route, content=path.read_bytes()))
        if answer.status_code >= 500 and answer.status_code != 503:
            raise RuntimeError(f"{route} answered {answer.status_code}: {answer.text[:200]}")

    return read


READERS: dict[str, Reader] = {
    "configs": Reader(("configs/*/*.yaml",), _plain(_read_config), "yaml"),
    "settings": Reader(("texts/settings.txt",), _plain(_read_settings), "yaml"),
    "tokenizer-json": Reader(("tokenizers/*/*.json",), _plain(_read_tokenizer)),
    "tokenizer-model": Reader(("tokenizers/sentencepiece/*.model",), _plain(_read_tokenizer), "binary"),
    "tokenizer-import": Reader(("export/tokenizer*.json",), _plain(_read_foreign_tokenizer)),
    "tokenizer-pickle": Reader(("pickle/*.pkl",), _plain(_read_pickle), "binary"),
    "chat-template": Reader(("export/chat_template.jinja",), _open_chat_template, "yaml", seconds=60),
    "checkpoint": Reader(("run/checkpoints/last.ckpt",), _plain(_read_checkpoint), "binary"),
    "checkpoint-unchecked": Reader(("run/checkpoints/last.ckpt",), _plain(_read_unchecked_checkpoint), "binary"),
    "huggingface-config": Reader(("export/config.json",), _plain(_read_huggingface_folder)),
    "huggingface-weights": Reader(("export/*.safetensors",), _plain(_read_huggingface_folder), "binary"),
    "stream-metadata": Reader(("stream/metadata.json",), _plain(_read_stream)),
    "stream-tokens": Reader(("stream/*.bin",), _plain(_read_stream), "binary"),
    "run-json": Reader(("run/run.json",), _plain(_read_run)),
    "metrics-jsonl": Reader(("run/metrics.jsonl",), _plain(_read_run)),
    "evaluation-json": Reader(("run/evaluation.json",), _plain(_read_run)),
    "run-configs": Reader(("run/configs/*.yaml",), _plain(_read_run), "yaml"),
    "samples": Reader(("run/samples.md",), _plain(_read_run), "binary"),
    "samples-truncated": Reader(("run/samples.md",), _plain(_truncate_samples), "binary"),
    "plots": Reader(("run/metrics.jsonl",), _plain(_read_plots), seconds=40, share=0.2),
    "corpus": Reader(("corpora/*.[tc]*", "corpora/*.gz", "corpora/*.parquet"), _plain(_read_corpus), "binary"),
    "corpus-json": Reader(("corpora/*.jsonl", "corpora/*.json"), _plain(_read_corpus)),
    "prompts": Reader(("texts/prompts.txt",), _plain(_read_prompts), "binary"),
    "judge": Reader(("texts/answer.json", "texts/grades.txt"), _plain(_read_judge_answer)),
    "hub": Reader(("export/*",), _plain(_read_files_to_push)),
    "hosts": Reader(("texts/host.txt",), _plain(_read_hosts), "binary"),
    "requests": Reader(("requests/*.json",), _open_server, seconds=40),
}  # fmt: skip


def files_of(reader: Reader, folder: Path) -> list[Path]:
    """Return the files that become mutants, in an order that is the same everywhere."""
    return sorted({file for pattern in reader.targets for file in folder.glob(pattern) if file.is_file()})


@contextlib.contextmanager
def replaced(file: Path, data: bytes) -> Iterator[None]:
    """Give a file other content for a while."""
    whole = file.with_name(file.name + ".whole")
    shutil.copy2(file, whole)
    try:
        file.write_bytes(data)
        yield
    finally:
        whole.replace(file)
