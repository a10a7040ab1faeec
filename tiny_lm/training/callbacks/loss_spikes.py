"""Loss spikes: a run whose loss is NaN or infinite is stopped, and a loss that jumps is reported.

Both messages name the step, the micro-batch with its text, and the checkpoint to resume from.
"""

import math
from collections import deque
from contextlib import suppress
from statistics import fmean, median
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from torch import Tensor

from tiny_lm.console import shell_command
from tiny_lm.data.bin.data_module import BinTokenDataModule
from tiny_lm.errors import UserError
from tiny_lm.files import write_text
from tiny_lm.runs import Run
from tiny_lm.tokenizer import load_tokenizer
from tiny_lm.training.callbacks.base import StepCallback
from tiny_lm.training.config import TrainingConfig

_MAX_HISTORY = 100  # steps that a new loss is compared with
_MIN_HISTORY = 20  # below this, too few for a baseline: a loss is compared with the highest one
_MAX_PENDING = 1024  # losses that may stay on the device before they are checked

# What is a spike unless the config sets a threshold: one nat, and far outside the noise of the steps before
# (1.4826 times the median deviation is the standard deviation of normal noise).
_MIN_RISE = 1.0
_MIN_RISE_EARLY = 2.0  # with little history
_MAX_DEVIATIONS = 6 * 1.4826


class LossSpikeDetector(StepCallback):
    """Checks the loss of every step, and the weights before they are saved.

    The losses stay on the device until metrics or a checkpoint are due, so no step waits for them. This callback runs
    first at the end of a step: what it rejects is neither logged nor saved.
    """

    def __init__(self, config: TrainingConfig, run: Run, data: BinTokenDataModule, console: Console) -> None:
        """Watch a run that trains on ``data``; warnings go to ``console``."""
        self._config = config
        self._run = run
        self._data = data
        self._console = console
        self._losses: list[Tensor] = []  # per micro-batch since the last check, as Lightning divided them
        self._history: deque[float] = deque(maxlen=_MAX_HISTORY)  # per step
        self._in_spike = False  # the last step was a spike, too
        self._is_main = False  # whether this is rank 0

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Record whether this is rank 0."""
        self._is_main = trainer.is_global_zero

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the loss of a micro-batch."""
        self._losses.append(outputs["loss"].detach())
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Check the losses if metrics, a validation or a checkpoint are due."""
        config = self._config
        intervals = (config.log_every_n_steps, config.val_every_n_steps, config.save_every_n_steps)
        is_due = any(step % interval == 0 for interval in intervals) or step == trainer.max_steps
        if is_due or len(self._losses) >= _MAX_PENDING:
            self.check_losses(trainer, step)

    def check_losses(self, trainer: pl.Trainer, step: int) -> None:
        """Check the losses up to optimizer step ``step``; all ranks must call it.

        Raises:
            UserError: a loss is NaN or infinite, or rose by more than ``spike_threshold``.
        """
        if not self._losses:
            return
        share, ranks = trainer.accumulate_grad_batches, trainer.world_size
        mine = torch.stack(self._losses).float() * share  # Lightning divides the loss by the number of micro-batches
        self._losses = []
        everyone = trainer.strategy.all_gather(mine).reshape(ranks, -1, share)  # [ranks, steps, micro-batches]
        steps: list[list[float]] = everyone.permute(1, 2, 0).flatten(1).tolist()  # in the order of the data
        sequences = self._data.micro_batch * share * ranks  # of one step
        first = self._data.sequences_seen - len(steps) * sequences
        for number, losses in enumerate(steps):
            self._check_step(step - len(steps) + 1 + number, losses, first + number * sequences)

    def check_weights(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        """Refuse to save NaN or infinite weights; all ranks must call it.

        An overflowing gradient corrupts the weights in its own step, but shows in the loss of the next one only.

        Raises:
            UserError: a weight is not finite.
        """
        weights = [weight.detach() for weight in module.parameters() if weight.numel()]
        largest = torch.nn.utils.get_total_norm(weights, norm_type=math.inf)
        if not trainer.strategy.reduce_boolean_decision(bool(largest.isfinite()), all=True):
            raise UserError(f"step {step:,} left NaN or infinite weights: {self._advice()}")

    def _check_step(self, step: int, losses: list[float], position: int) -> None:
        """Compare the mean loss of a step, which starts at ``position`` of the data, with the previous ones."""
        loss = fmean(losses)
        if not math.isfinite(loss):
            worst = next(number for number, value in enumerate(losses) if not math.isfinite(value))
            batch = self._describe(step, losses, position, worst)
            raise UserError(f"the loss is {losses[worst]} at step {step:,}, in {batch}: {self._advice()}")
        rise, limit, typical = self._compare_to_history(loss)
        self._history.append(loss)
        if rise <= limit:
            self._in_spike = False
            return
        message = (
            f"the loss is {loss:.3f} at step {step:,}, {rise:.2f} nats above {typical} before, "
            f"worst in {self._describe(step, losses, position, losses.index(max(losses)))}"
        )
        if self._config.spike_threshold is not None:
            raise UserError(f"{message}; spike_threshold is {self._config.spike_threshold}: {self._advice()}")
        if not self._in_spike:
            self._console.print(f"warning: {message}; {self.last_checkpoint()}", markup=False)
        self._in_spike = True

    def _compare_to_history(self, loss: float) -> tuple[float, float, str]:
        """Return how far a loss is above the previous ones, the limit, and a description of the baseline."""
        threshold, past = self._config.spike_threshold, len(self._history)
        if past < _MIN_HISTORY:
            highest = max(self._history, default=loss)
            steps = "the step" if past == 1 else f"the highest of the {past} steps"
            return loss - highest, threshold or _MIN_RISE_EARLY, steps
        typical = median(self._history)
        noise = median(abs(past - typical) for past in self._history)
        return loss - typical, threshold or max(_MIN_RISE, _MAX_DEVIATIONS * noise), f"the median of the {past} steps"

    # --- messages -----------------------------------------------------------------------------------------------------

    def _describe(self, step: int, losses: list[float], position: int, worst: int) -> str:
        """Name micro-batch ``worst`` of the step that starts at ``position``, and write its text to a file."""
        size = self._data.micro_batch
        position += worst * size
        number = position // size
        epoch, sequences = self._data.sequences_at(position)
        shown = ", ".join(map(str, sequences[:4])) + (f" and {len(sequences) - 4} more" if len(sequences) > 4 else "")
        file = self._run.batches / f"{number:08d}.txt"
        if self._is_main:
            heading = f"step {step}, micro-batch {number}, epoch {epoch}, loss {losses[worst]}\n"
            with suppress(UserError):  # a full disk must not hide the error
                write_text(file, heading + self._quote(sequences))
        return f"micro-batch {number:,} (epoch {epoch}, sequences {shown}; its text is in {file})"

    def _quote(self, sequences: list[int]) -> str:
        """Return the text of sequences, each under its position in the stream."""
        dataset, tokenizer = self._data.train_dataset, load_tokenizer(self._run.tokenizer)
        quotes = []
        for sequence in sequences:
            file, start = dataset.find(sequence)
            text = tokenizer.decode(dataset[sequence][0].tolist(), skip_special=False)
            where = f"{file}, tokens {start} to {start + dataset.block_size}"
            quotes.append(f"\n--- sequence {sequence}: {where} ---\n{text}\n")
        return "".join(quotes)

    def last_checkpoint(self) -> str:
        """Describe the last good checkpoint, as the end of a message."""
        if not self._run.last_checkpoint.is_file():
            return "no checkpoint was written yet"
        saved = self._run.saved_steps()
        return f"the last good checkpoint is {saved[-1][1] if saved else self._run.last_checkpoint}"

    def _advice(self) -> str:
        """Name the last good checkpoint, and the command that resumes with half the learning rate."""
        config = self._config
        action = "resume" if self._run.last_checkpoint.is_file() else "start again"
        rate = max(config.learning_rate / 2, config.min_lr)
        setting = f"training.learning_rate={rate:g}"
        command = shell_command("tiny-lm", "train", "--resume", self._run.folder, "--set", setting)
        return f"{self.last_checkpoint()}; {action} with a lower rate: {command}"

    # --- checkpoints --------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Key of this state in checkpoints: the name that the class had when the format was fixed."""
        return "LossGuard"

    def state_dict(self) -> dict[str, Any]:
        """Return the loss history; all losses are checked before a save."""
        return {"history": list(self._history), "jumped": self._in_spike}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the loss history."""
        self._history.extend(state_dict["history"])
        self._in_spike = state_dict["jumped"]
