import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tiny_lm.data import StreamMetadata
from tiny_lm.data.tokenize import tokenize_corpus
from tiny_lm.dataset import DatasetConfig, iter_documents
from tiny_lm.dataset.stories import generate_stories
from tiny_lm.errors import UserError
from tiny_lm.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer


def test_stream_holds_each_document_between_bos_and_eos(
    stream_folder: Path, tokenizer: Tokenizer, stories: list[str]
) -> None:
    ids = np.fromfile(stream_folder / "val.bin", dtype="<u2").tolist()
    expected = [i for story in stories[280:] for i in tokenizer.encode(story, bos=True, eos=True)]
    assert ids == expected


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_template_goes_with_the_tokenizer(
    place: str, tokenizer: Tokenizer, stories: list[str], tmp_path: Path
) -> None:
    """Wherever Hugging Face's folders keep it."""
    folder, template = tmp_path / "chatty", "{{ bos_token }}{{ messages[0].content }}"
    tokenizer.save(folder)
    content = {**json.loads((folder / "tokenizer_config.json").read_text()), "chat_template": template}
    (folder / place).write_text(json.dumps(content) if place.endswith(".json") else template)
    corpus = {"train": stories[:20], "val": stories[280:]}
    tokenize_corpus(load_tokenizer(folder), corpus, tmp_path / "stream", source="stories")
    carried = load_tokenizer(tmp_path / "stream" / "tokenizer")
    assert (carried.chat_template, carried.hash) == (template, tokenizer.hash)
    tokenize_corpus(tokenizer, corpus, tmp_path / "stream", source="stories")  # with one that has none
    assert load_tokenizer(tmp_path / "stream" / "tokenizer").chat_template is None


def test_metadata_counts_what_is_there(stream_folder: Path, tokenizer: Tokenizer, stories: list[str]) -> None:
    metadata = StreamMetadata.read(stream_folder)
    train = metadata.files["train.bin"]
    lengths = [len(tokenizer.encode(story, bos=True, eos=True)) for story in stories[:280]]
    assert (train.documents, train.tokens, train.shortest, train.longest) == (
        280,
        sum(lengths),
        min(lengths),
        max(lengths),
    )
    assert train.bytes == sum(len(story.encode()) for story in stories[:280])
    assert metadata.special_tokens == tokenizer.special_tokens
    assert metadata.dtype == "uint16"


def test_stream_carries_its_tokenizer(stream_folder: Path, tokenizer: Tokenizer) -> None:
    assert (
        load_tokenizer(stream_folder / "tokenizer").hash
        == tokenizer.hash
        == StreamMetadata.read(stream_folder).tokenizer_hash
    )


def test_vocabulary_above_16_bits_takes_32(tmp_path: Path) -> None:
    characters = [chr(code) for code in range(0x20, 0x20000) if not 0xD800 <= code <= 0xDFFF]
    config = TokenizerConfig(name="large", type="char", dataset_config="stories")
    tokenizer = train_tokenizer(config, ["".join(characters)])
    assert tokenizer.vocab_size > 2**16
    text = characters[0] + characters[-1]
    metadata = tokenize_corpus(tokenizer, {"train": [text], "val": [text]}, tmp_path, source="test")
    assert metadata.dtype == "uint32"
    assert np.fromfile(tmp_path / "val.bin", dtype="<u4").tolist() == tokenizer.encode(text, bos=True, eos=True)


def test_empty_split_is_refused_and_leaves_nothing_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="the val split holds no document"):
        tokenize_corpus(tokenizer, {"train": ["a story"], "val": []}, tmp_path / "s", source="test")
    assert not (tmp_path / "s" / "metadata.json").exists()
    assert not (tmp_path / "s" / "val.bin").exists()


def test_interrupted_run_leaves_the_stream_that_was_there(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenize_corpus(tokenizer, {"train": ["old"], "val": ["old"]}, tmp_path, source="test")

    def interrupted() -> Iterator[str]:
        yield "a story"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus(tokenizer, {"train": interrupted(), "val": ["new"]}, tmp_path, source="test")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metadata.json", "tokenizer", "train.bin", "val.bin"]
    ids = np.fromfile(tmp_path / "train.bin", dtype="<u2").tolist()
    assert ids == tokenizer.encode("old", bos=True, eos=True)
    assert StreamMetadata.read(tmp_path).files["train.bin"].tokens == len(ids)


def test_stream_without_metadata_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metadata.json: missing, so the stream is incomplete"):
        StreamMetadata.read(tmp_path)


def test_metadata_of_something_else_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text(json.dumps({"kind": "BPE"}))
    with pytest.raises(UserError, match=r"metadata.json: unknown key 'kind'"):
        StreamMetadata.read(tmp_path)


def test_real_stories_keep_every_byte(tinystories: Path, tmp_path: Path) -> None:
    dataset = DatasetConfig(
        name=str(tinystories), source="local", splits={"train": "train.txt", "validation": "valid.txt"}
    )
    valid = list(iter_documents(dataset, "validation"))
    tokenizer = train_tokenizer(TokenizerConfig(name="t", vocab_size=1024, dataset_config="x"), valid)
    metadata = tokenize_corpus(
        tokenizer, {"train": iter_documents(dataset, "train"), "val": valid}, tmp_path, source="x"
    )
    assert metadata.files["train.bin"].documents == 4540
    assert metadata.files["val.bin"].documents == 300
    ids = np.fromfile(tmp_path / "val.bin", dtype="<u2")
    documents = np.split(ids, np.flatnonzero(ids == tokenizer.eos_id) + 1)[:-1]
    assert [tokenizer.decode(document.tolist()) for document in documents] == valid


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit on the size of a file")
def test_a_full_disk_leaves_the_stream_that_was_there(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The limit on the size of a file stands for the end of the disk: both end a write in the middle."""
    stream = tmp_path / "stream"
    tokenize_corpus(tokenizer, {"train": ["old"], "val": ["old"]}, stream, source="test")
    before = {path: path.read_bytes() for path in stream.rglob("*") if path.is_file()}
    code = f"""
        import resource
        from pathlib import Path
        from tiny_lm.data.tokenize import tokenize_corpus
        from tiny_lm.dataset.stories import generate_stories
        from tiny_lm.errors import UserError
        from tiny_lm.tokenizer import load_tokenizer
        tokenizer = load_tokenizer({str(stream / "tokenizer")!r})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        corpus = {{"train": generate_stories(9_000), "val": ["new"]}}
        try:
            tokenize_corpus(tokenizer, corpus, Path({str(stream)!r}), source="x")
        except UserError as error:
            print(error)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert "train.bin: could not be written (File too large)" in result.stdout, result.stderr[-2000:]
    assert {path: path.read_bytes() for path in stream.rglob("*") if path.is_file()} == before


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process as Linux does")
@pytest.mark.deep
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A corpus of 200 MiB goes through a process whose data may take 160 MiB in all."""
    stories = "\n<|endoftext|>\n".join(generate_stories(1000, seed=2))
    corpus = tmp_path / "corpus.txt"
    with corpus.open("w") as file:
        while file.tell() < 200 * 2**20:
            file.write(stories + "\n<|endoftext|>\n")
    tokenizer.save(tmp_path / "tokenizer")
    code = f"""
        import resource
        from pathlib import Path
        from tiny_lm.data.tokenize import tokenize_corpus
        from tiny_lm.dataset import DatasetConfig, iter_documents
        from tiny_lm.tokenizer import load_tokenizer
        tokenizer = load_tokenizer({str(tmp_path / "tokenizer")!r})
        dataset = DatasetConfig(name={str(corpus)!r}, source="local")
        resource.setrlimit(resource.RLIMIT_DATA, (160 * 2**20, 160 * 2**20))
        documents = iter_documents(dataset, "train", val_split=0)
        corpus = {{"train": documents, "val": ["one"]}}
        metadata = tokenize_corpus(tokenizer, corpus, Path({str(tmp_path / "stream")!r}), source="x", num_threads=2)
        print(metadata.files["train.bin"].bytes)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout) > 190 * 2**20
