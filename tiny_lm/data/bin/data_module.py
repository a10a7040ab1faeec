"""The Lightning side of token streams: loaders, and the position in them that a checkpoint keeps."""

import signal
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from tiny_lm.data.bin.config import BinDataConfig
from tiny_lm.data.bin.dataset import IGNORE_INDEX, BinTokenDataset
from tiny_lm.data.bin.sampler import SequentialBatchSampler, ShuffledBatchSampler
from tiny_lm.data.bin.stream import TokenStream, open_stream
from tiny_lm.errors import UserError
from tiny_lm.tokenizer import check_same_tokenizer

_Loader = DataLoader[tuple[torch.Tensor, torch.Tensor]]


def _ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C to the main process, which needs its loaders until the step is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class BinTokenDataModule(pl.LightningDataModule):
    """Training and validation batches ``(x, y)``, int64 ``[B, T]`` each, of the streams that a data config names."""

    def __init__(
        self,
        config: BinDataConfig,
        *,
        seed: int = 0,
        ignore_index: int = IGNORE_INDEX,
        micro_batch: int | None = None,
    ) -> None:
        """Open both streams.

        Args:
            config: streams, windows and batches.
            seed: of the order of the training windows.
            ignore_index: target that counts in no loss.
            micro_batch: windows that this process reads at a time, where it is not the config's ``batch_size``.

        Raises:
            UserError: a stream is missing or damaged, too small, or the two come from different tokenizers.
        """
        super().__init__()
        self.config = config
        self._seed = seed
        self.micro_batch = micro_batch or config.batch_size
        self._sequences_seen = 0  # by all ranks together, at the step where this process began
        self._first_step = 0
        self.train_stream: TokenStream = open_stream(config.train_path, config)
        self.val_stream: TokenStream = open_stream(config.val_path, config)
        check_same_tokenizer(
            self.train_stream.metadata.tokenizer_hash,
            self.val_stream.metadata.tokenizer_hash,
            config.train_path,
            config.val_path,
            "write both with one `tiny-lm tokenize`",
        )
        self.train_dataset = BinTokenDataset(self.train_stream, config, ignore_index=ignore_index)
        self.val_dataset = BinTokenDataset(self.val_stream, config, every_token=True, ignore_index=ignore_index)
        if config.drop_last and len(self.train_dataset) < config.batch_size:
            raise UserError(
                f"{config.train_path}: gives {len(self.train_dataset)} windows, fewer than batch_size "
                f"{config.batch_size}; use more text, a smaller batch_size or block_size, or drop_last: false"
            )

    @property
    def sizes(self) -> dict[str, int]:
        """Tokens of both streams, as they are written down."""
        return {"train_tokens": self.train_stream.tokens, "val_tokens": self.val_stream.tokens}

    def train_dataloader(self) -> _Loader:
        """Endless, shuffled by (seed, epoch), starting behind the windows that a resumed run has seen."""
        self._first_step = 0 if self.trainer is None else self.trainer.global_step
        order = self._order(self._sequences_seen, *self._place())
        return self._loader(self.train_dataset, order, self.config.num_workers)

    def val_dataloader(self, max_tokens: int | None = None) -> _Loader:
        """Every token of the validation stream once, in order, or the windows of its first ``max_tokens``.

        Several processes share them.

        Raises:
            UserError: a stream was overwritten since it was opened.
        """
        for dataset in (self.train_dataset, self.val_dataset):
            dataset.check_unchanged()
        sequences = len(self.val_dataset)
        if max_tokens is not None:
            sequences = min(sequences, -(-max_tokens // self.config.block_size))
        rank, world_size = self._place()
        order = SequentialBatchSampler(sequences, self.micro_batch, rank=rank, world_size=world_size)
        return self._loader(self.val_dataset, order, workers=0)

    def _order(self, start: int, rank: int = 0, world_size: int = 1) -> ShuffledBatchSampler:
        return ShuffledBatchSampler(
            len(self.train_dataset),
            self.config.batch_size,
            seed=self._seed,
            drop_last=self.config.drop_last,
            start=start,
            rank=rank,
            world_size=world_size,
            micro_batch=self.micro_batch,
        )

    def _place(self) -> tuple[int, int]:
        """Return the rank of this process and the number of processes."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

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

    @property
    def sequences_seen(self) -> int:
        """How many windows all ranks have trained on; the loaders themselves may have read ahead."""
        assert self.trainer is not None
        _, world_size = self._place()
        sequences_per_step = self.micro_batch * world_size * self.trainer.accumulate_grad_batches
        steps = self.trainer.global_step - self._first_step
        return self._sequences_seen + steps * sequences_per_step

    def sequences_at(self, place: int) -> tuple[int, list[int]]:
        """Return the epoch and the windows of the micro-batch that begins behind ``place`` windows."""
        order = self._order(place)
        return place // order.epoch_length, next(iter(order)).tolist()

    def state_dict(self) -> dict[str, Any]:
        """Return how many windows all ranks have trained on."""
        return {"windows_seen": self.sequences_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on behind the windows that a checkpoint has seen."""
        if "batches_seen" in state_dict:  # written before several processes could share a batch
            self._sequences_seen = int(state_dict["batches_seen"]) * self.config.batch_size
        else:
            self._sequences_seen = int(state_dict["windows_seen"])
