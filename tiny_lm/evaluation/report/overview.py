"""What was trained on what data: headline, key metrics, and the tables at the beginning and end of a report."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tiny_lm.console import shell_command
from tiny_lm.errors import UserError
from tiny_lm.evaluation.report.artifacts import RunArtifacts
from tiny_lm.model import FAMILY_NAMES, ModelConfig, model_config_from_dict, parameter_table
from tiny_lm.pages.text import duration, fixed, number, percent, short, spoken
from tiny_lm.runs import mean_over_time, number_in

Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class KeyMetric:
    """A metric shown large at the top."""

    name: str
    value: str
    note: str


@dataclass(frozen=True)
class ModelView:
    """The model: its config and parameter counts."""

    config: ModelConfig
    family: str
    parameters: int
    parts: list[tuple[str, int, float]]
    """Name, number and share of parameters of each part that has any."""
    rows: Rows


def view_model(artifacts: RunArtifacts) -> ModelView | None:
    """Describe the model by its resolved config."""
    try:
        config = model_config_from_dict(artifacts.configs["model"], source=str(artifacts.run.configs / "model.yaml"))
    except UserError as error:
        artifacts.missing.setdefault("model config", str(error))
        return None
    table = parameter_table(config)
    parameters = sum(table.values())
    parts = [(name, count, count / parameters) for name, count in table.items() if count]
    heads = f"{config.n_heads} of {config.head_size}"
    if config.kv_heads != config.n_heads:
        heads += f", {config.kv_heads} key-value heads"
    rows = [
        ("Layers", str(config.n_layers)),
        ("Width", f"{config.d_model}, {config.ffn_size:,} in the feed-forward"),
        ("Attention heads", heads),
        ("Context", f"{config.context_length:,} tokens"),
        ("Vocabulary", f"{config.vocab_size:,} tokens"),
        ("Positions", {"learned": "learned", "rope": "rotary (RoPE)"}[config.position]),
    ]
    return ModelView(config, FAMILY_NAMES[config.architecture], parameters, parts, rows)


def headline(artifacts: RunArtifacts, model: ModelView | None) -> str:
    """Summarize in a sentence what was trained, for how long, on how much."""
    what = f"A {model.family} of {spoken(model.parameters)} parameters" if model else "A language model"
    seconds, tokens = artifacts.number("seconds"), artifacts.number("tokens")
    how = f", trained for {duration(seconds)}" if seconds else ", in training"
    return what + how + (f" on {spoken(tokens)} tokens" if tokens else "")


def key_metrics(artifacts: RunArtifacts, model: ModelView | None) -> list[KeyMetric]:
    """Return the key metrics: quality on the whole validation stream, then cost."""
    loss, perplexity = artifacts.number("metrics", "val_loss"), artifacts.number("metrics", "val_ppl")
    bits, tokens = artifacts.number("metrics", "val_bpb"), artifacts.number("tokens")
    seconds, steps = artifacts.number("seconds"), artifacts.number("steps")
    parameters = model.parameters if model else artifacts.number("parameters")
    found = [
        (loss, KeyMetric("Validation loss", fixed(loss, 3), "nats per token, on unseen text")),
        (perplexity, KeyMetric("Perplexity", number(perplexity), "equivalent to choosing among this many tokens")),
        (
            bits,
            KeyMetric("Bits per byte", fixed(bits, 3), "comparable across tokenizers; raw text has\N{NO-BREAK SPACE}8"),
        ),
        (tokens, KeyMetric("Tokens seen", short(tokens), _epochs(artifacts) or "in training")),
        (seconds, KeyMetric("Time", duration(seconds), f"{number(steps)} optimizer steps" if steps else "of training")),
        (parameters, KeyMetric("Parameters", short(parameters), "trainable weights")),
    ]
    return [metric for value, metric in found if value is not None]


def _epochs(artifacts: RunArtifacts) -> str:
    tokens, available = artifacts.number("tokens"), artifacts.number("train_tokens")
    if not tokens or not available:
        return ""
    epochs = tokens / available
    return f"{percent(epochs)} of the training text" if epochs < 1 else f"{number(epochs)} epochs"


def data_rows(artifacts: RunArtifacts) -> Rows:
    """Describe the data."""
    streams = artifacts.streams
    rows: Rows = []
    if streams:
        rows.append(("Source", streams.validation.metadata.source))
    for name, key, statistics in (
        ("Training", "train_tokens", streams and streams.train_statistics),
        ("Validation", "val_tokens", streams and streams.val_statistics),
    ):
        tokens = artifacts.number(key)
        parts = [f"{number(tokens)} tokens"] if tokens else []
        if statistics:
            parts += [f"{short(statistics.bytes)} bytes of text", f"{statistics.documents:,} documents"]
        if parts:
            rows.append((name, ", ".join(parts)))
    if epochs := _epochs(artifacts):
        rows.append(("Seen in training", epochs))
    return rows


def recipe_rows(artifacts: RunArtifacts) -> Rows:
    """Describe the training recipe."""
    config, data = artifacts.configs["training"], artifacts.configs["data"]
    if not config:
        return []
    optimizer = {"muon": "Muon on hidden matrices, AdamW on the rest", "adamw": "AdamW"}
    schedule = {"wsd": "warm-up, stable, decay", "none": "constant"}
    decay = {"linear": "linear decay to 0", "cosine": "cosine decay to 0"}
    decay_schedule = str(config.get("weight_decay_schedule"))
    batch_size = number_in(data, "batch_size")
    accumulation = number_in({"accumulate_grad_batches": 1, **config}, "accumulate_grad_batches")
    context = number_in(data, "block_size")
    batch = (
        f"{number(batch_size * accumulation)} sequences of {number(context)} tokens"
        if batch_size and accumulation
        else ""
    )
    step = artifacts.number("tokens_per_step")
    peak, last = number_in(config, "learning_rate"), number_in(config, "min_lr")
    rate = f"{number(peak)} peak, {number(last)} final"
    steps, planned = artifacts.number("steps"), number(number_in(config, "max_steps"))
    init_from, init_step = artifacts.text("init_from", "path"), artifacts.number("init_from", "step")
    rows = [
        ("Initial weights", init_from + (f", step {init_step:,.0f}" if init_step else "")),
        ("Optimizer", optimizer.get(str(config.get("optimizer")), str(config.get("optimizer")))),
        ("Learning rate", f"{rate} ({schedule.get(str(config.get('scheduler')), config.get('scheduler'))})"),
        ("Weight decay", f"{number(number_in(config, 'weight_decay'))}, {decay.get(decay_schedule, decay_schedule)}"),
        ("Batch", f"{batch}, {number(step)} tokens" if batch and step else batch),
        (
            "Steps",
            f"{number(steps)} of {planned}" if steps else planned,
        ),
        ("Precision", artifacts.text("precision") + (", compiled" if artifacts.record.get("compiled") is True else "")),
        ("Seed", str(config.get("seed", ""))),
    ]
    return [(name, value) for name, value in rows if value]


def cost_rows(artifacts: RunArtifacts) -> Rows:
    """Describe the measured cost of training."""
    speed, mfu = mean_over_time(artifacts.events, "tokens_per_sec"), mean_over_time(artifacts.events, "mfu")
    peak, source = artifacts.number("peak_flops", "value"), artifacts.text("peak_flops", "source")
    tokens, flops = artifacts.number("tokens"), artifacts.number("flops_per_token")
    process, gpu = (
        artifacts.number("memory", "process_peak_memory_mb"),
        artifacts.number("memory", "gpu_peak_memory_mb"),
    )
    origin = {"table": "the vendor's data sheet", "measured": "measured on this machine"}.get(source, source)
    work = f"{tokens * flops:.3g} floating-point operations ({number(flops)} per token)" if tokens and flops else ""
    share = f"{mfu:.1%} MFU, of {peak / 1e12:,.3g} TFLOP/s ({origin})" if math.isfinite(mfu) and peak else ""
    rows = [
        ("Device", artifacts.text("device")),
        ("Wall time", duration(artifacts.number("seconds")) if artifacts.number("seconds") else ""),
        ("Speed", f"{number(speed)} tokens/s" if math.isfinite(speed) else ""),
        ("Work", work),
        ("Utilisation", share),
        ("Memory", ", ".join(_mib(name, value) for name, value in (("process", process), ("GPU", gpu)) if value)),
    ]
    return [(name, value) for name, value in rows if value]


def _mib(name: str, value: float) -> str:
    return f"{name} {value:,.0f} MiB peak"


def machine_rows(artifacts: RunArtifacts) -> Rows:
    """Describe software and machine."""
    versions = artifacts.record.get("environment", {}).get("versions", {}) if _has_environment(artifacts) else {}
    names = (("System", "platform"), ("Processor", "processor"), ("Python", "python"))
    rows = [(name, artifacts.text("environment", key)) for name, key in names]
    if isinstance(versions, dict):
        rows += [(str(name), str(version)) for name, version in versions.items() if version]
    return [(name, value) for name, value in rows if value]


def git_line(artifacts: RunArtifacts) -> str:
    """Describe the version of the source code."""
    git = artifacts.record["environment"].get("git") if _has_environment(artifacts) else None
    if not isinstance(git, dict) or not git.get("commit"):
        return "installed package, not a git checkout"
    changed = git.get("changed_files")
    return f"{git['commit']}, " + (
        f"with uncommitted changes in {changed} files" if changed else "no uncommitted changes"
    )


def command_line(artifacts: RunArtifacts) -> str:
    """Return the training command, quoted for a shell; empty if unknown."""
    words = artifacts.record["environment"].get("command") if _has_environment(artifacts) else None
    if not isinstance(words, Sequence) or not words or not all(isinstance(word, str) for word in words):
        return ""
    program, *arguments = words
    return shell_command(Path(program).name if Path(program).name == "tiny-lm" else program, *arguments)


def _has_environment(artifacts: RunArtifacts) -> bool:
    return isinstance(artifacts.record.get("environment"), dict)
