"""Documents from the Hugging Face Hub, through the `datasets` library: streamed, or downloaded into its cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tiny_lm.config import nearest, shorten
from tiny_lm.dataset.config import DatasetConfig, Split
from tiny_lm.dataset.text_file import DOCUMENT_LIMIT
from tiny_lm.errors import UserError

_TIMEOUT = 10.0  # seconds for the Hub's first answer; the library alone retries for half a minute before it gives up
_BATCH = 64  # documents in memory
_NETWORK_LIBRARIES = {"httpx", "httpx2", "httpcore", "requests", "urllib3", "aiohttp"}


def read_huggingface(config: DatasetConfig, split: Split) -> Iterator[str]:
    """Yield the documents of a split, unchanged; empty ones are dropped.

    A copy of the same commit in the cache is used even if ``config.streaming`` is set; without a network, the latest
    cached copy is used.

    Raises:
        UserError: the Hub cannot be reached and nothing is cached; unknown data set, configuration, split or
            text field, or no right to read it.
    """
    place = f"{config.name}, split {config.split_name(split)!r}"
    with _as_user_error(place):
        builder = _builder(config)
        # The cache folder is named by the commit, so its content is current.
        dataset = _cached(builder, config, split) if _stored(builder, config) else _streamed(builder, config, split)
        yield from _texts(dataset, config.text_field, place)


def download_huggingface(config: DatasetConfig, split: Split) -> int:
    """Download a data set into the cache, with the library's own progress bar, and return the rows of ``split``.

    Raises:
        UserError: as for :func:`read_huggingface`, or the disk is full.
    """
    with _as_user_error(f"{config.name}, split {config.split_name(split)!r}"):
        return len(_cached(_builder(config), config, split))


def _stored(builder: Any, config: DatasetConfig) -> bool:
    return not config.streaming or Path(builder.cache_dir).is_dir()


def _cached(builder: Any, config: DatasetConfig, split: Split) -> Any:
    builder.download_and_prepare()
    return builder.as_dataset(split=config.split_name(split))


def _streamed(builder: Any, config: DatasetConfig, split: Split) -> Any:
    return builder.as_streaming_dataset(split=config.split_name(split))


def _builder(config: DatasetConfig) -> Any:
    """Find the data set: a local folder of the Hub's layout, else on the Hub, else in the cache."""
    from datasets import load_dataset_builder

    if Path(config.name).is_dir() or _on_hub(config):
        return load_dataset_builder(
            config.name, config.config_name, revision=config.revision, cache_dir=config.cache_dir
        )
    return _builder_of_cache(config)


def _on_hub(config: DatasetConfig) -> bool:
    """Return whether the Hub has the data set; False if the Hub cannot be reached.

    Raises:
        UserError: the Hub has no such data set or revision.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        HfApi().dataset_info(config.name, revision=config.revision, timeout=_TIMEOUT)
    except RevisionNotFoundError:
        raise UserError(f"{config.name}: has no revision {config.revision!r} on the Hub") from None
    except RepositoryNotFoundError:
        message = "no such data set on the Hub, or a private one; check the name, or log in with `hf auth login`"
        raise UserError(f"{config.name}: {message}") from None
    except HFValidationError:
        raise UserError(f"{config.name}: not a valid data set name on the Hub, which has the form owner/name") from None
    except Exception as error:
        if not is_network_error(error):
            raise
        return False
    return True


def _builder_of_cache(config: DatasetConfig) -> Any:
    from datasets.packaged_modules.cache.cache import Cache

    short_name = config.name.rpartition("/")[2]
    try:
        builder = Cache(
            cache_dir=config.cache_dir,
            repo_id=config.name,
            dataset_name=short_name,
            config_name=config.config_name,
            version="auto",
            hash="auto",
        )
    except ValueError:
        raise _unreachable(config.name) from None
    if config.revision not in (None, builder.hash):  # it takes the latest copy, and only a commit can be recognised
        raise _unreachable(config.name)
    return builder


def _unreachable(place: str) -> UserError:
    return UserError(
        f"{place}: the Hugging Face Hub cannot be reached; check the network, "
        "or use your own files (`source: local`) or the built-in stories (`source: stories`)"
    )


def is_network_error(error: BaseException) -> bool:
    """Return whether ``error`` is a connection error; the Hub client's HTTP library differs by version."""
    return isinstance(error, ConnectionError | TimeoutError) or (
        type(error).__module__.partition(".")[0] in _NETWORK_LIBRARIES
    )


@contextmanager
def _as_user_error(place: str) -> Iterator[None]:
    """Convert any error of the library to a one-line UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # no common base: its own classes, OSError, ValueError, Arrow's, HTTP's
        if is_network_error(error):
            raise _unreachable(place) from error
        problem = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{place}: {problem[:300]}") from error


def _texts(dataset: Any, field: str, place: str) -> Iterator[str]:
    """Yield the text column, read alone where the columns are known before the first row."""
    columns = dataset.column_names
    if columns is not None and field in columns:
        dataset = dataset.select_columns([field])
    row = 0
    for batch in dataset.with_format("arrow").iter(batch_size=_BATCH):  # Python strings would take as much memory again
        if field not in batch.column_names:
            raise UserError(f"{place}: has no field {field!r}, set text_field{nearest(field, batch.column_names)}")
        for value in batch[field]:
            if hasattr(value, "as_buffer") and value.is_valid and value.as_buffer().size > DOCUMENT_LIMIT:
                limit = DOCUMENT_LIMIT // 2**20
                raise UserError(f"{place}: the document in row {row} is larger than {limit} MiB; use a copy without it")
            text = value.as_py()
            if not isinstance(text, str | None):
                raise UserError(f"{place}: the field {field!r} is not text but {shorten(text)}; set text_field")
            if text and not text.isspace():
                yield text
            row += 1
