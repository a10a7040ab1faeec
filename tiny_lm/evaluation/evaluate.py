"""Everything that ``tiny-lm eval`` measures of a run, and ``evaluation.json``, where it is kept."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from tiny_lm.config import parse_overrides
from tiny_lm.data import BinDataConfig
from tiny_lm.data.bin.dataset import BinTokenDataset
from tiny_lm.data.bin.sampler import OrderedBatches
from tiny_lm.data.bin.stream import TokenStream, hold_streams, open_stream
from tiny_lm.errors import UserError
from tiny_lm.evaluation.quality import Progress, Quality, invented_words, length_of, overlap, variety
from tiny_lm.evaluation.stories import story_beginnings, tell_stories
from tiny_lm.files import write_json
from tiny_lm.hardware.device import fastest_device
from tiny_lm.inference import Sampling, TextGenerator
from tiny_lm.inference.request import Generated
from tiny_lm.inference.scoring import LossStats, loss_by_position, sum_losses
from tiny_lm.model.checkpoint import load_checkpoint_model
from tiny_lm.runs import Run, open_run
from tiny_lm.tokenizer import load_tokenizer

_MOST_LOGITS = 2**26  # numbers of one batch of logits, 256 MB of them


@dataclass(frozen=True)
class EvaluationOptions:
    """What to measure, and how the stories are told.

    Attributes:
        stride: tokens from one window to the next; None: windows stand side by side, as in training.
        samples: stories to tell; the beginnings repeat, with other random numbers, where there are fewer.
        max_new_tokens: most tokens of a story.
        temperature: divides the logits.
        top_p: draw from the likeliest tokens that together have this probability.
        seed: of the first story.
        settings: overrides of the run's configs, such as ``data.val_path=...`` for a stream that was moved.
    """

    stride: int | None = None
    samples: int = 24
    max_new_tokens: int = 300
    temperature: float = 0.8
    top_p: float = 1.0
    seed: int = 0
    settings: tuple[str, ...] = ()

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(self.temperature, top_p=self.top_p)


@dataclass(frozen=True)
class StreamReading:
    """Which validation stream was read, and how."""

    path: str
    tokens: int
    """Targets that were predicted, each once."""
    bytes: int
    """UTF-8 bytes of the text."""
    method: str
    """``blocked``: windows side by side. ``sliding``: all but a file's first window predict ``stride`` tokens each, and
    read ``window - stride`` tokens before them as context."""
    window: int
    stride: int
    precision: str


@dataclass(frozen=True)
class PositionLoss:
    """Mean loss of the targets that follow ``first`` to ``last`` tokens of context in their window."""

    first: int
    last: int
    tokens: int
    loss: float


@dataclass(frozen=True)
class Story:
    """A generated story."""

    prompt: str
    text: str
    """What follows the prompt."""
    ended: bool
    tokens: int
    longest_copy: int
    """Tokens of the longest part that stands word for word in the training stream."""


@dataclass(frozen=True)
class Evaluation:
    """The content of ``evaluation.json``."""

    run: str
    checkpoint: str
    step: int
    created: str
    stream: StreamReading
    loss: float
    """Mean over the whole validation stream, in nats per token."""
    perplexity: float
    bits_per_byte: float
    position_loss: tuple[PositionLoss, ...]
    quality: Quality
    samples: tuple[Story, ...]
    judge: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the evaluation as JSON values."""
        return asdict(self)

    def with_judge(self, judge: dict[str, Any]) -> "Evaluation":
        """Return the same evaluation with a judge's figures."""
        return replace(self, judge=judge)

    def save(self, run: Run) -> Path:
        """Write ``evaluation.json`` into the run folder, whole or not at all.

        Raises:
            UserError: it cannot be written.
        """
        write_json(run.evaluation, self.to_dict())
        return run.evaluation


@dataclass(frozen=True)
class Subject:
    """A run with all that its evaluation reads, checked against each other."""

    run: Run
    checkpoint: Path
    step: int
    generator: TextGenerator
    config: BinDataConfig
    train: TokenStream
    val: TokenStream


def open_subject(path: str | Path, options: EvaluationOptions) -> Subject:
    """Open a run folder, or a checkpoint in one, and the streams it was trained on.

    Raises:
        UserError: something is missing, damaged, or does not belong to the run.
    """
    path = Path(path)
    is_checkpoint = path.suffix == ".ckpt"
    run = open_run(path.parent.parent if is_checkpoint else path)
    checkpoint = path if is_checkpoint else run.model_checkpoint()
    overrides = parse_overrides(list(options.settings), ["data"])["data"]
    config = BinDataConfig.from_yaml(str(run.configs / "data.yaml"), overrides)
    if options.stride is not None and not 1 <= options.stride <= config.block_size:
        raise UserError(f"--stride must be between 1 and the window of {config.block_size} (it is {options.stride})")
    loaded = load_checkpoint_model(checkpoint)
    train, val = open_stream(config.train_path, config), open_stream(config.val_path, config)
    for name, stream in ((config.train_path, train), (config.val_path, val)):
        if stream.metadata.tokenizer_hash != loaded.tokenizer_hash:
            raise UserError(f"{name}: was not written by the tokenizer that {checkpoint} was trained with")
    tokenizer = load_tokenizer(run.tokenizer)
    if tokenizer.hash != loaded.tokenizer_hash:
        raise UserError(f"{run.tokenizer}: is not the tokenizer that {checkpoint} was trained with")
    generator = TextGenerator(loaded.model.to(fastest_device()), tokenizer)
    return Subject(run, checkpoint, loaded.step, generator, config, train, val)


def evaluate_run(subject: Subject, options: EvaluationOptions, progress: Progress) -> Evaluation:
    """Measure a run: loss over the whole validation stream, and the quality of the stories it tells.

    The same options give the same figures. Nothing is written.

    Args:
        subject: the run, as :func:`open_subject` returns it.
        options: what to measure.
        progress: told of each step.

    Raises:
        UserError: a number of the options is out of its range, or a stream is being written or was written again.
    """
    with hold_streams(subject.train, subject.val):
        return _evaluate(subject, options, progress)


def _evaluate(subject: Subject, options: EvaluationOptions, progress: Progress) -> Evaluation:
    reading, positions = measure_loss(subject, options.stride, progress)
    total = sum_losses(positions)
    prompts = _encodable(story_beginnings(), subject.generator)

    def tell(stories: int) -> None:
        progress("telling stories", stories, options.samples)

    told = tell_stories(
        subject.generator,
        list(islice(cycle(prompts), options.samples)),
        options.sampling,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        progress=tell,
    )
    quality, samples = _count(subject, told, min(len(prompts), options.samples), options, progress)
    return Evaluation(
        run=str(subject.run.folder),
        checkpoint=str(subject.checkpoint),
        step=subject.step,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        stream=reading,
        loss=total.loss,
        perplexity=total.perplexity,
        bits_per_byte=total.bits_per_byte(subject.val.bytes_per_token),
        position_loss=buckets(positions),
        quality=quality,
        samples=samples,
    )


def _encodable(prompts: list[str], generator: TextGenerator) -> list[str]:
    """Return the prompts whose characters the tokenizer knows, or the empty one where there are none."""

    def is_known(prompt: str) -> bool:
        try:
            return generator.tokenizer.decode(generator.tokenizer.encode(prompt)) == prompt
        except UserError:
            return False

    return [prompt for prompt in prompts if is_known(prompt)] or [""]


def measure_loss(subject: Subject, stride: int | None, progress: Progress) -> tuple[StreamReading, list[LossStats]]:
    """Predict each token of the validation stream once.

    Without a stride the windows are those of training's own validation, in its precision, and so is the loss. Other
    arguments are those of :func:`evaluate_run`.

    Returns:
        what was read, and the surprise at each position of a window.
    """
    config, model = subject.config, subject.generator.model
    window = config.block_size
    overlap_ = window - (stride or window)
    dataset = BinTokenDataset(subject.val, config, every_token=True, overlap=overlap_)
    batch_size = max(1, min(config.batch_size, _MOST_LOGITS // (window * model.config.vocab_size)))
    device = model.token_emb.weight.device
    autocast, precision = _precision_of(subject.run, device)

    def batches() -> Any:
        for windows in OrderedBatches(len(dataset), batch_size):
            yield dataset[windows]
            progress("measuring the loss", len(windows), len(dataset))

    with autocast:
        positions = loss_by_position(model, batches(), device=device)
    reading = StreamReading(
        path=config.val_path,
        tokens=sum_losses(positions).tokens,
        bytes=round(subject.val.bytes_per_token * subject.val.tokens),
        method="sliding" if overlap_ else "blocked",
        window=window,
        stride=window - overlap_,
        precision=precision,
    )
    return reading, positions


def _precision_of(run: Run, device: torch.device) -> tuple[AbstractContextManager[Any], str]:
    """Return how to compute as the run's training did where it ran on the same kind of device, else in float32."""
    record = run.read_record()
    same_kind = str(record.get("device", "")).startswith("CPU") == (device.type == "cpu")
    precision = str(record.get("precision", ""))
    types = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    if same_kind and precision in types:
        return torch.autocast(device.type, types[precision]), precision
    return nullcontext(), "32-true"


def buckets(positions: list[LossStats]) -> tuple[PositionLoss, ...]:
    """Gather the positions 1, 2-3, 4-7, 8-15, ... of a window; one without targets is left out.

    The last one takes what is left, as long as that is less than half of the next one.
    """
    found, first, width = [], 1, 1
    while first <= len(positions):
        last = first + width - 1
        if last + width >= len(positions):
            last = len(positions)
        part = sum_losses(positions[first - 1 : last])
        if part.tokens:
            found.append(PositionLoss(first, last, part.tokens, part.loss))
        first, width = last + 1, 2 * width
    return tuple(found)


def _count(
    subject: Subject, told: list[Generated], prompts: int, options: EvaluationOptions, progress: Progress
) -> tuple[Quality, tuple[Story, ...]]:
    tokenizer = subject.generator.tokenizer
    distinct, repeated = variety(told)
    copied, copies = overlap(told, subject.train, subject.val, tokenizer, progress)
    quality = Quality(
        prompts=prompts,
        samples=len(told),
        temperature=options.temperature,
        top_p=options.top_p,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        distinct=distinct,
        repeated=repeated,
        ended=sum(story.finish_reason == "stop" for story in told) / len(told),
        length=length_of(told),
        copied=copied,
        invented_words=invented_words(told, subject.train, tokenizer, progress),
    )
    samples = tuple(
        Story(story.prompt, story.text, story.finish_reason == "stop", len(story.ids), copy.length)
        for story, copy in zip(told, copies, strict=True)
    )
    return quality, samples
