"""What watches the loss: a run whose loss is no longer a number ends, and a loss that jumps is told.

Both name the step, the micro-batch with its text, and the checkpoint to go on from.
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

_MEMORY = 100  # steps whose losses a new one is compared with
_ENOUGH = 20  # fewer are no measure of what is usual: a loss is compared with the highest of them
_PENDING = 1024  # losses on the device that are looked at in one go, at the latest

# A jump worth a warning where the config sets no threshold: one nat, and far outside the noise of the steps before
# (1.4826 times the median deviation is the standard deviation of normal noise).
_NATS = 1.0
_NATS_AT_FIRST = 2.0  # of few steps little is known but that the loss falls
_DEVIATIONS = 6 * 1.4826


class LossSpikeDetector(StepCallback):
    """Looks at the loss of every step, and at the weights before they are saved.

    The losses stay on the device until a log window closes or a checkpoint is due, so no step waits for them. The
    guard acts before anything else at the end of a step: nothing that it refuses is logged as the best or saved.
    """

    def __init__(self, config: TrainingConfig, run: Run, data: BinTokenDataModule, console: Console) -> None:
        """Watch a run that trains on ``data``; warnings go to ``console``."""
        self._config = config
        self._run = run
        self._data = data
        self._console = console
        self._losses: list[Tensor] = []  # of the micro-batches since the last look, as Lightning divided them
        self._history: deque[float] = deque(maxlen=_MEMORY)  # of steps
        self._jumped = False  # the loss of the last step stood out too
        self._writes = False  # this process, of those that train together

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Learn whether this is the process that writes."""
        self._writes = trainer.is_global_zero

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the loss of a micro-batch."""
        self._losses.append(outputs["loss"].detach())
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Look at the losses if something is about to be made of them."""
        config = self._config
        rhythms = (config.log_every_n_steps, config.val_every_n_steps, config.save_every_n_steps)
        is_due = any(step % rhythm == 0 for rhythm in rhythms) or step == trainer.max_steps
        if is_due or len(self._losses) >= _PENDING:
            self.check_losses(trainer, step)

    def check_losses(self, trainer: pl.Trainer, step: int) -> None:
        """Look at the losses up to the end of optimizer step ``step``; all processes must call it.

        Raises:
            UserError: one is no number, or jumped by more than ``spike_threshold``.
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
            self._judge(step - len(steps) + 1 + number, losses, first + number * sequences)

    def check_weights(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        """Refuse to save weights that are no numbers; all processes must call it.

        A gradient that overflows spoils the weights of its own step, and shows in the loss of the next one only.

        Raises:
            UserError: a weight is not finite.
        """
        weights = [weight.detach() for weight in module.parameters() if weight.numel()]
        largest = torch.nn.utils.get_total_norm(weights, norm_type=math.inf)
        if not trainer.strategy.reduce_boolean_decision(bool(largest.isfinite()), all=True):
            raise UserError(f"step {step:,} left weights that are no numbers: {self._way_out()}")

    def _judge(self, step: int, losses: list[float], place: int) -> None:
        """Compare the loss of one step, the mean of its micro-batches, with those before; ``place``: of its windows."""
        loss = fmean(losses)
        if not math.isfinite(loss):
            worst = next(number for number, value in enumerate(losses) if not math.isfinite(value))
            batch = self._describe(step, losses, place, worst)
            raise UserError(f"the loss is {losses[worst]} at step {step:,}, in {batch}: {self._way_out()}")
        rise, limit, usual = self._compare(loss)
        self._history.append(loss)
        if rise <= limit:
            self._jumped = False
            return
        told = (
            f"the loss is {loss:.3f} at step {step:,}, {rise:.2f} nats above {usual} before, "
            f"worst in {self._describe(step, losses, place, losses.index(max(losses)))}"
        )
        if self._config.spike_threshold is not None:
            raise UserError(f"{told}; spike_threshold is {self._config.spike_threshold}: {self._way_out()}")
        if not self._jumped:
            self._console.print(f"warning: {told}; {self.last_checkpoint()}", markup=False)
        self._jumped = True

    def _compare(self, loss: float) -> tuple[float, float, str]:
        """Return by how much a loss stands above those before, how much is too much, and which those are."""
        threshold, past = self._config.spike_threshold, len(self._history)
        if past < _ENOUGH:
            highest = max(self._history, default=loss)
            steps = "the step" if past == 1 else f"the highest of the {past} steps"
            return loss - highest, threshold or _NATS_AT_FIRST, steps
        usual = median(self._history)
        noise = median(abs(past - usual) for past in self._history)
        return loss - usual, threshold or max(_NATS, _DEVIATIONS * noise), f"the median of the {past} steps"

    # --- what the user is told ----------------------------------------------------------------------------------------

    def _describe(self, step: int, losses: list[float], place: int, worst: int) -> str:
        """Name micro-batch ``worst`` of the step whose windows begin at ``place``, and write down its text."""
        size = self._data.micro_batch
        place += worst * size
        number = place // size
        epoch, sequences = self._data.sequences_at(place)
        shown = ", ".join(map(str, sequences[:4])) + (f" and {len(sequences) - 4} more" if len(sequences) > 4 else "")
        file = self._run.batches / f"{number:08d}.txt"
        if self._writes:
            heading = f"step {step}, micro-batch {number}, epoch {epoch}, loss {losses[worst]}\n"
            with suppress(UserError):  # a full disk takes nothing from what is wrong here
                write_text(file, heading + self._quote(sequences))
        return f"micro-batch {number:,} (epoch {epoch}, windows {shown}; its text is in {file})"

    def _quote(self, sequences: list[int]) -> str:
        """Return the text of windows, each under its place in the stream."""
        dataset, tokenizer = self._data.train_dataset, load_tokenizer(self._run.tokenizer)
        quotes = []
        for window in sequences:
            file, start = dataset.find(window)
            text = tokenizer.decode(dataset[window][0].tolist(), skip_special=False)
            place = f"{file}, tokens {start} to {start + dataset.block_size}"
            quotes.append(f"\n--- window {window}: {place} ---\n{text}\n")
        return "".join(quotes)

    def last_checkpoint(self) -> str:
        """Say where the last good checkpoint is, as the end of a line."""
        if not self._run.last_checkpoint.is_file():
            return "no checkpoint was written yet"
        saved = self._run.saved_steps()
        return f"the last good checkpoint is {saved[-1][1] if saved else self._run.last_checkpoint}"

    def _way_out(self) -> str:
        """Name the last good checkpoint, and the command that goes on from there in a calmer way."""
        config = self._config
        begin = "go on" if self._run.last_checkpoint.is_file() else "begin again"
        rate = max(config.learning_rate / 2, config.min_lr)
        setting = f"training.learning_rate={rate:g}"
        command = shell_command("tiny-lm", "train", "--resume", self._run.folder, "--set", setting)
        return f"{self.last_checkpoint()}; {begin} with a lower rate: {command}"

    # --- checkpoints --------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Key of this state in checkpoints: the name that the class had when the format was fixed."""
        return "LossGuard"

    def state_dict(self) -> dict[str, Any]:
        """Return what later losses are compared with; whoever saves has looked at all losses before."""
        return {"history": list(self._history), "jumped": self._jumped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing."""
        self._history.extend(state_dict["history"])
        self._jumped = state_dict["jumped"]
