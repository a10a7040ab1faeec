"""The Lightning data module of token streams: data loaders, and the data position that a checkpoint holds."""

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
    """Leave Ctrl-C to the main process, which needs its workers until the step is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class BinTokenDataModule(pl.LightningDataModule):
    """Training and validation batches ``(x, y)``, int64 ``[B, T]`` each, from the streams of a data config."""

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
            config: streams, sequences and batches.
            seed: of the order of the training sequences.
            ignore_index: target that is ignored in the loss.
            micro_batch: sequences that this rank reads at a time; by default the config's ``batch_size``.

        Raises:
            UserError: a stream is missing or damaged, too small, or the two have different tokenizers.
        """
        super().__init__()
        self.config = config
        self._seed = seed
        self.micro_batch = micro_batch or config.batch_size
        self._sequences_seen = 0  # by all ranks together, when this process started
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
                f"{config.train_path}: holds {len(self.train_dataset)} sequences, fewer than batch_size "
                f"{config.batch_size}; use more text, a smaller batch_size or block_size, or drop_last: false"
            )

    @property
    def sizes(self) -> dict[str, int]:
        """Tokens of both streams, as recorded in checkpoints and ``run.json``."""
        return {"train_tokens": self.train_stream.tokens, "val_tokens": self.val_stream.tokens}

    def train_dataloader(self) -> _Loader:
        """Return the endless loader, shuffled by (seed, epoch); a resumed run continues where it stopped."""
        self._first_step = 0 if self.trainer is None else self.trainer.global_step
        order = self._order(self._sequences_seen, *self._rank_and_world_size())
        return self._loader(self.train_dataset, order, self.config.num_workers)

    def val_dataloader(self, max_tokens: int | None = None) -> _Loader:
        """Return a loader over the validation stream in order, or over its first ``max_tokens``, split between ranks.

        Raises:
            UserError: a stream was overwritten since it was opened.
        """
        for dataset in (self.train_dataset, self.val_dataset):
            dataset.check_unchanged()
        sequences = len(self.val_dataset)
        if max_tokens is not None:
            sequences = min(sequences, -(-max_tokens // self.config.block_size))
        rank, world_size = self._rank_and_world_size()
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

    def _rank_and_world_size(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _loader(self, dataset: BinTokenDataset, batches: Any, workers: int) -> _Loader:
        # A batch is one vectorized read of a memory map: on a CPU a worker process costs more than it saves.
        on_gpu = torch.cuda.is_available()
        workers = workers if on_gpu else 0
        return DataLoader(
            dataset,
            sampler=batches,
            batch_size=None,  # the sampler yields whole batches
            num_workers=workers,
            pin_memory=self.config.pin_memory and on_gpu,
            persistent_workers=workers > 0,
            worker_init_fn=_ignore_interrupts,
            generator=torch.Generator(),  # otherwise each pass over a loader would advance the global random state
        )

    @property
    def sequences_seen(self) -> int:
        """Sequences that all ranks have trained on; the loaders may have prefetched more."""
        assert self.trainer is not None
        _, world_size = self._rank_and_world_size()
        sequences_per_step = self.micro_batch * world_size * self.trainer.accumulate_grad_batches
        steps = self.trainer.global_step - self._first_step
        return self._sequences_seen + steps * sequences_per_step

    def sequences_at(self, position: int) -> tuple[int, list[int]]:
        """Return the epoch and the sequences of the micro-batch that starts at ``position`` of the order."""
        order = self._order(position)
        return position // order.epoch_length, next(iter(order)).tolist()

    def state_dict(self) -> dict[str, Any]:
        """Return the data position under the key of the checkpoint format."""
        return {"windows_seen": self.sequences_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the sequences that a checkpoint has seen."""
        if "batches_seen" in state_dict:  # from before batches were split between ranks
            self._sequences_seen = int(state_dict["batches_seen"]) * self.config.batch_size
        else:
            self._sequences_seen = int(state_dict["windows_seen"])
