"""The Lightning side of token streams: loaders, and the position in them that a checkpoint keeps."""

import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import torch
from torch.utils.data import BatchSampler, DataLoader, Sampler

from tiny_lm.data.bin import IGNORE_INDEX, BinTokenDataset, TokenStream, open_stream
from tiny_lm.data.config import BinDataConfig
from tiny_lm.errors import UserError

_Loader = DataLoader[tuple[torch.Tensor, torch.Tensor]]


def _ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C to the main process, which needs its loaders until the step is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class ShuffledBatches(Sampler[npt.NDArray[np.int64]]):
    """An endless sequence of batches of window indices, a pure function of (seed, number of the batch).

    Each epoch is its own permutation of all windows, drawn from (seed, epoch). Training is therefore one unbroken
    sequence that can be entered at any batch, which is how a run resumes on exactly the batches that were to come.
    """

    def __init__(self, windows: int, batch_size: int, *, seed: int, drop_last: bool, start: int = 0) -> None:
        """Shuffle ``windows`` windows into batches; ``start`` is the number of batches already seen."""
        self._windows = windows
        self._batch_size = batch_size
        self._seed = seed
        self._start = start
        self.batches_per_epoch = windows // batch_size if drop_last else -(-windows // batch_size)

    def __iter__(self) -> Iterator[npt.NDArray[np.int64]]:
        epoch, batch = divmod(self._start, self.batches_per_epoch)
        while True:
            order = np.random.default_rng([self._seed, epoch]).permutation(self._windows)
            for first in range(batch * self._batch_size, self.batches_per_epoch * self._batch_size, self._batch_size):
                yield order[first : first + self._batch_size]
            epoch, batch = epoch + 1, 0


class BinTokenDataModule(pl.LightningDataModule):
    """Training and validation batches ``(x, y)``, int64 ``[B, T]`` each, of the streams that a data config names."""

    def __init__(self, config: BinDataConfig, *, seed: int = 0, ignore_index: int = IGNORE_INDEX) -> None:
        """Open both streams.

        Raises:
            UserError: a stream is missing or damaged, too small, or the two come from different tokenizers.
        """
        super().__init__()
        self.config = config
        self._seed = seed
        self._batches_seen = 0
        self.train_stream: TokenStream = open_stream(config.train_path, config)
        self.val_stream: TokenStream = open_stream(config.val_path, config)
        if self.train_stream.metadata.tokenizer_hash != self.val_stream.metadata.tokenizer_hash:
            raise UserError(f"{config.train_path} and {config.val_path} were written by different tokenizers")
        self.train_dataset = BinTokenDataset(self.train_stream, config, ignore_index=ignore_index)
        self.val_dataset = BinTokenDataset(self.val_stream, config, every_token=True, ignore_index=ignore_index)
        if config.drop_last and len(self.train_dataset) < config.batch_size:
            raise UserError(
                f"{config.train_path}: gives {len(self.train_dataset)} windows, fewer than batch_size "
                f"{config.batch_size}; use more text, a smaller batch_size or block_size, or drop_last: false"
            )

    def train_dataloader(self) -> _Loader:
        """Endless, shuffled by (seed, epoch), starting behind the batches that a resumed run has seen."""
        batches = ShuffledBatches(
            len(self.train_dataset),
            self.config.batch_size,
            seed=self._seed,
            drop_last=self.config.drop_last,
            start=self._batches_seen,
        )
        return self._loader(self.train_dataset, batches, self.config.num_workers)

    def val_dataloader(self, max_tokens: int | None = None) -> _Loader:
        """Every token of the validation stream once, in order, or the windows of its first ``max_tokens``."""
        windows = len(self.val_dataset)
        if max_tokens is not None:
            windows = min(windows, -(-max_tokens // self.config.block_size))
        order = BatchSampler(range(windows), self.config.batch_size, drop_last=False)
        return self._loader(self.val_dataset, order, workers=0)

    def _loader(self, dataset: BinTokenDataset, batches: Any, workers: int) -> _Loader:
        # A batch is one vectorised read of a memory map: on a CPU a worker process costs more than it saves.
        on_gpu = torch.cuda.is_available()
        workers = workers if on_gpu else 0
        return DataLoader(
            dataset,
            sampler=batches,
            batch_size=None,  # the sampler gives whole batches
            num_workers=workers,
            pin_memory=self.config.pin_memory and on_gpu,
            persistent_workers=workers > 0,
            worker_init_fn=_ignore_interrupts,
            generator=torch.Generator(),  # else each pass over a loader would draw from the global random state
        )

    def state_dict(self) -> dict[str, Any]:
        """Return how many batches training has used; the loader itself may have read ahead."""
        assert self.trainer is not None
        total: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return {"batches_seen": total.processed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on behind the batches that a checkpoint has seen."""
        self._batches_seen = int(state_dict["batches_seen"])
