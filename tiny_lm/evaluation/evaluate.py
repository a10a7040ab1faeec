"""Everything that ``tiny-lm eval`` measures of a run."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from tiny_lm.config import parse_overrides
from tiny_lm.data import BinDataConfig
from tiny_lm.data.bin.dataset import BinTokenDataset
from tiny_lm.data.bin.sampler import SequentialBatchSampler
from tiny_lm.data.bin.stream import TokenStream, hold_streams, open_stream
from tiny_lm.errors import UserError
from tiny_lm.evaluation.generation import evaluation_prompts, generate_samples
from tiny_lm.evaluation.quality import OnProgress, find_invented_words, length_stats, measure_overlap, ngram_diversity
from tiny_lm.evaluation.results import EvaluatedSample, EvaluatedStream, Evaluation, PositionLoss, SampleQuality
from tiny_lm.hardware.device import fastest_device
from tiny_lm.inference import SamplingParams, TextGenerator
from tiny_lm.inference.request import Completion
from tiny_lm.inference.scoring import LossStats, loss_by_position, sum_losses
from tiny_lm.model.checkpoint import load_checkpoint_model
from tiny_lm.runs import Run, is_checkpoint, open_run, run_folder_of
from tiny_lm.tokenizer import check_same_tokenizer, load_tokenizer

_MAX_LOGITS = 2**26  # elements in one batch of logits: 256 MB


@dataclass(frozen=True)
class EvaluationOptions:
    """What to measure and how to sample.

    Attributes:
        stride: tokens from one sequence to the next; None: adjacent sequences, as in training.
        samples: samples to generate; with more samples than prompts, prompts repeat with other seeds.
        max_new_tokens: maximum length of a completion.
        temperature: divides the logits.
        top_p: sample from the smallest set of tokens with this total probability.
        seed: seed of the first sample.
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
    def sampling(self) -> SamplingParams:
        """The sampling parameters."""
        return SamplingParams(temperature=self.temperature, top_p=self.top_p)


@dataclass(frozen=True)
class LoadedRun:
    """A run with everything its evaluation reads, checked for consistency."""

    run: Run
    checkpoint: Path
    step: int
    generator: TextGenerator
    config: BinDataConfig
    train: TokenStream
    val: TokenStream


def load_run(path: str | Path, options: EvaluationOptions) -> LoadedRun:
    """Load a run, or one of its checkpoints, and open the streams it was trained on.

    Raises:
        UserError: something is missing, damaged, or does not belong to the run.
    """
    path = Path(path)
    run = open_run(run_folder_of(path))
    checkpoint = path if is_checkpoint(path) else run.model_checkpoint()
    overrides = parse_overrides(list(options.settings), ["data"])["data"]
    config = BinDataConfig.from_yaml(str(run.configs / "data.yaml"), overrides)
    if options.stride is not None and not 1 <= options.stride <= config.block_size:
        raise UserError(f"--stride must be between 1 and block_size={config.block_size} (got {options.stride})")
    checkpoint_model = load_checkpoint_model(checkpoint)
    train, val = open_stream(config.train_path, config), open_stream(config.val_path, config)
    for name, stream in ((config.train_path, train), (config.val_path, val)):
        check_same_tokenizer(stream.metadata.tokenizer_hash, checkpoint_model.tokenizer_hash, name, checkpoint)
    tokenizer = load_tokenizer(run.tokenizer)
    check_same_tokenizer(tokenizer.hash, checkpoint_model.tokenizer_hash, run.tokenizer, checkpoint)
    generator = TextGenerator(checkpoint_model.model.to(fastest_device()), tokenizer)
    return LoadedRun(run, checkpoint, checkpoint_model.step, generator, config, train, val)


def evaluate_run(loaded: LoadedRun, options: EvaluationOptions, on_progress: OnProgress) -> Evaluation:
    """Measure a run's loss over the whole validation stream and the quality of its samples.

    The same options give the same results. Nothing is written.

    Args:
        loaded: the run, as :func:`load_run` returns it.
        options: what to measure.
        on_progress: called after each step.

    Raises:
        UserError: an option is out of range, or a stream is being written or was rewritten.
    """
    with hold_streams(loaded.train, loaded.val):
        return _evaluate(loaded, options, on_progress)


def _evaluate(loaded: LoadedRun, options: EvaluationOptions, on_progress: OnProgress) -> Evaluation:
    stream, positions = measure_loss(loaded, options.stride, on_progress)
    total = sum_losses(positions)
    prompts = _encodable(evaluation_prompts(), loaded.generator)
    samples = generate_samples(
        loaded.generator,
        list(islice(cycle(prompts), options.samples)),
        options.sampling,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        on_progress=lambda count: on_progress("generating samples", count, options.samples),
    )
    quality, evaluated = _measure_quality(loaded, samples, min(len(prompts), options.samples), options, on_progress)
    return Evaluation(
        run=str(loaded.run.folder),
        checkpoint=str(loaded.checkpoint),
        step=loaded.step,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        stream=stream,
        loss=total.loss,
        perplexity=total.perplexity,
        bits_per_byte=total.bits_per_byte(loaded.val.bytes_per_token),
        position_loss=bucket_positions(positions),
        quality=quality,
        samples=evaluated,
    )


def _encodable(prompts: list[str], generator: TextGenerator) -> list[str]:
    """Return the prompts that the tokenizer can represent; ``[""]`` if there are none."""

    def round_trips(prompt: str) -> bool:
        try:
            return generator.tokenizer.decode(generator.tokenizer.encode(prompt)) == prompt
        except UserError:
            return False

    return [prompt for prompt in prompts if round_trips(prompt)] or [""]


def measure_loss(
    loaded: LoadedRun, stride: int | None, on_progress: OnProgress
) -> tuple[EvaluatedStream, list[LossStats]]:
    """Predict each token of the validation stream once.

    Without a stride, sequences and precision are those of training's own validation, and so is the loss. The other
    arguments are those of :func:`evaluate_run`.

    Returns:
        a description of what was read, and the loss at each position of a sequence.
    """
    config, model = loaded.config, loaded.generator.model
    block_size = config.block_size
    overlap = block_size - (stride or block_size)
    dataset = BinTokenDataset(loaded.val, config, every_token=True, overlap=overlap)
    batch_size = max(1, min(config.batch_size, _MAX_LOGITS // (block_size * model.config.vocab_size)))
    device = model.token_emb.weight.device
    autocast, precision = _training_precision(loaded.run, device)

    def batches() -> Any:
        for indices in SequentialBatchSampler(len(dataset), batch_size):
            yield dataset[indices]
            on_progress("measuring the loss", len(indices), len(dataset))

    with autocast:
        positions = loss_by_position(model, batches(), device=device)
    stream = EvaluatedStream(
        path=config.val_path,
        tokens=sum_losses(positions).tokens,
        bytes=round(loaded.val.bytes_per_token * loaded.val.tokens),
        method="sliding" if overlap else "blocked",
        window=block_size,
        stride=block_size - overlap,
        precision=precision,
    )
    return stream, positions


def _training_precision(run: Run, device: torch.device) -> tuple[AbstractContextManager[Any], str]:
    """Return the training precision if the run was trained on the same kind of device, else float32."""
    record = run.read_metadata()
    same_kind = str(record.get("device", "")).startswith("CPU") == (device.type == "cpu")
    precision = str(record.get("precision", ""))
    dtypes = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    if same_kind and precision in dtypes:
        return torch.autocast(device.type, dtypes[precision]), precision
    return nullcontext(), "32-true"


def bucket_positions(positions: list[LossStats]) -> tuple[PositionLoss, ...]:
    """Merge positions 1, 2-3, 4-7, 8-15, ... of a sequence; buckets without targets are omitted.

    The last bucket also takes the remainder if that is less than half of the next one.
    """
    buckets, first, width = [], 1, 1
    while first <= len(positions):
        last = first + width - 1
        if last + width >= len(positions):
            last = len(positions)
        part = sum_losses(positions[first - 1 : last])
        if part.tokens:
            buckets.append(PositionLoss(first=first, last=last, tokens=part.tokens, loss=part.loss))
        first, width = last + 1, 2 * width
    return tuple(buckets)


def _measure_quality(
    loaded: LoadedRun, samples: list[Completion], prompts: int, options: EvaluationOptions, on_progress: OnProgress
) -> tuple[SampleQuality, tuple[EvaluatedSample, ...]]:
    tokenizer = loaded.generator.tokenizer
    distinct, repeated = ngram_diversity(samples)
    overlap, matches = measure_overlap(samples, loaded.train, loaded.val, tokenizer, on_progress)
    quality = SampleQuality(
        prompts=prompts,
        samples=len(samples),
        temperature=options.temperature,
        top_p=options.top_p,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        distinct=distinct,
        repeated=repeated,
        ended=sum(sample.finish_reason == "stop" for sample in samples) / len(samples),
        length=length_stats(samples),
        copied=overlap,
        invented_words=find_invented_words(samples, loaded.train, tokenizer, on_progress),
    )
    evaluated = tuple(
        EvaluatedSample(
            prompt=sample.prompt,
            text=sample.text,
            ended=sample.finish_reason == "stop",
            tokens=len(sample.ids),
            longest_copy=match.length,
        )
        for sample, match in zip(samples, matches, strict=True)
    )
    return quality, evaluated
