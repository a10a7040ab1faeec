"""What was trained on what: the sentence, the large figures and the tables that a report begins and ends with."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tiny_lm.console import shell_command
from tiny_lm.errors import UserError
from tiny_lm.evaluation.report.material import Material
from tiny_lm.model import FAMILY_NAMES, ModelConfig, model_config_from_dict, parameter_table
from tiny_lm.pages.text import duration, fixed, number, percent, short, spoken
from tiny_lm.runs import mean_over_time, number_in

Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class Figure:
    """A large number."""

    name: str
    value: str
    note: str


@dataclass(frozen=True)
class ModelView:
    """The model: its config, and the parameters of its parts."""

    config: ModelConfig
    family: str
    parameters: int
    parts: list[tuple[str, int, float]]
    """Name, parameters and share of each part that has any, in the order of the table."""
    rows: Rows


def view_model(material: Material) -> ModelView | None:
    """Return the model, after its resolved config."""
    try:
        config = model_config_from_dict(material.configs["model"], source=str(material.run.configs / "model.yaml"))
    except UserError as error:
        material.missing.setdefault("model config", str(error))
        return None
    table = parameter_table(config)
    parameters = sum(table.values())
    parts = [(name, count, count / parameters) for name, count in table.items() if count]
    heads = f"{config.n_heads} of {config.head_size}"
    if config.kv_heads != config.n_heads:
        heads += f", sharing {config.kv_heads} pairs of keys and values"
    rows = [
        ("Layers", str(config.n_layers)),
        ("Width", f"{config.d_model}, {config.ffn_size:,} in the feed-forward"),
        ("Attention heads", heads),
        ("Context", f"{config.context_length:,} tokens"),
        ("Vocabulary", f"{config.vocab_size:,} tokens"),
        ("Positions", {"learned": "learned", "rope": "rotary (RoPE)"}[config.position]),
    ]
    return ModelView(config, FAMILY_NAMES[config.architecture], parameters, parts, rows)


def headline(material: Material, model: ModelView | None) -> str:
    """Say in a sentence what was trained, for how long, on what."""
    what = f"A {model.family} of {spoken(model.parameters)} parameters" if model else "A language model"
    seconds, tokens = material.number("seconds"), material.number("tokens")
    how = f", trained for {duration(seconds)}" if seconds else ", in training"
    return what + how + (f" on {spoken(tokens)} tokens" if tokens else "")


def figures(material: Material, model: ModelView | None) -> list[Figure]:
    """Return the large numbers: first those of the whole validation stream, then what they cost."""
    loss, perplexity = material.number("metrics", "val_loss"), material.number("metrics", "val_ppl")
    bits, tokens = material.number("metrics", "val_bpb"), material.number("tokens")
    seconds, steps = material.number("seconds"), material.number("steps")
    parameters = model.parameters if model else material.number("parameters")
    found = [
        (loss, Figure("Validation loss", fixed(loss, 3), "nats per token, on text it never saw")),
        (perplexity, Figure("Perplexity", number(perplexity), "as if choosing among so many tokens")),
        (bits, Figure("Bits per byte", fixed(bits, 3), "compares across tokenizers; bare text has\N{NO-BREAK SPACE}8")),
        (tokens, Figure("Tokens read", short(tokens), _epochs(material) or "in training")),
        (seconds, Figure("Time", duration(seconds), f"{number(steps)} optimizer steps" if steps else "of training")),
        (parameters, Figure("Parameters", short(parameters), "numbers that training sets")),
    ]
    return [figure for value, figure in found if value is not None]


def _epochs(material: Material) -> str:
    tokens, available = material.number("tokens"), material.number("train_tokens")
    if not tokens or not available:
        return ""
    epochs = tokens / available
    return f"{percent(epochs)} of the training text" if epochs < 1 else f"the training text {number(epochs)} times over"


def data_rows(material: Material) -> Rows:
    """Return what was read."""
    streams = material.streams
    rows: Rows = []
    if streams:
        rows.append(("Source", streams.validation.metadata.source))
    for name, key, statistics in (
        ("Training", "train_tokens", streams and streams.train_statistics),
        ("Validation", "val_tokens", streams and streams.val_statistics),
    ):
        tokens = material.number(key)
        parts = [f"{number(tokens)} tokens"] if tokens else []
        if statistics:
            parts += [f"{short(statistics.bytes)} bytes of text", f"{statistics.documents:,} documents"]
        if parts:
            rows.append((name, ", ".join(parts)))
    if epochs := _epochs(material):
        rows.append(("Seen", epochs))
    return rows


def recipe_rows(material: Material) -> Rows:
    """Return how it was trained, in the words of the field."""
    config, data = material.configs["training"], material.configs["data"]
    if not config:
        return []
    optimizer = {"muon": "Muon on hidden matrices, AdamW on the rest", "adamw": "AdamW"}
    schedule = {"wsd": "warm-up, stable, decay", "none": "constant"}
    decay = {"linear": "falling to 0 in a line", "cosine": "falling to 0 as a cosine"}
    fall = str(config.get("weight_decay_schedule"))
    windows = number_in(data, "batch_size")
    parts = number_in({"accumulate_grad_batches": 1, **config}, "accumulate_grad_batches")
    context = number_in(data, "block_size")
    batch = f"{number(windows * parts)} windows of {number(context)} tokens" if windows and parts else ""
    step = material.number("tokens_per_step")
    peak, last = number_in(config, "learning_rate"), number_in(config, "min_lr")
    rate = f"{number(peak)} at its peak, {number(last)} at the end"
    steps, planned = material.number("steps"), number(number_in(config, "max_steps"))
    begun, begun_step = material.text("init_from", "path"), material.number("init_from", "step")
    rows = [
        ("First weights", begun + (f", step {begun_step:,.0f}" if begun_step else "")),
        ("Optimizer", optimizer.get(str(config.get("optimizer")), str(config.get("optimizer")))),
        ("Learning rate", f"{rate} ({schedule.get(str(config.get('scheduler')), config.get('scheduler'))})"),
        ("Weight decay", f"{number(number_in(config, 'weight_decay'))}, {decay.get(fall, fall)}"),
        ("Batch", f"{batch}, {number(step)} tokens" if batch and step else batch),
        (
            "Steps",
            f"{number(steps)} of {planned}" if steps else planned,
        ),
        ("Precision", material.text("precision") + (", compiled" if material.record.get("compiled") is True else "")),
        ("Seed", str(config.get("seed", ""))),
    ]
    return [(name, value) for name, value in rows if value]


def cost_rows(material: Material) -> Rows:
    """Return what the training took, as far as it was measured."""
    speed, mfu = mean_over_time(material.events, "tokens_per_sec"), mean_over_time(material.events, "mfu")
    peak, source = material.number("peak_flops", "value"), material.text("peak_flops", "source")
    tokens, flops = material.number("tokens"), material.number("flops_per_token")
    process, gpu = material.number("memory", "process_peak_memory_mb"), material.number("memory", "gpu_peak_memory_mb")
    origin = {"table": "the vendor's data sheet", "measured": "measured on this machine"}.get(source, source)
    work = f"{tokens * flops:.3g} floating-point operations ({number(flops)} a token)" if tokens and flops else ""
    share = f"{mfu:.1%} MFU, of {peak / 1e12:,.3g} TFLOP/s ({origin})" if math.isfinite(mfu) and peak else ""
    rows = [
        ("Device", material.text("device")),
        ("Wall time", duration(material.number("seconds")) if material.number("seconds") else ""),
        ("Speed", f"{number(speed)} tokens/s" if math.isfinite(speed) else ""),
        ("Work", work),
        ("Utilisation", share),
        ("Memory", ", ".join(_mib(name, value) for name, value in (("process", process), ("GPU", gpu)) if value)),
    ]
    return [(name, value) for name, value in rows if value]


def _mib(name: str, value: float) -> str:
    return f"{name} {value:,.0f} MiB at its peak"


def machine_rows(material: Material) -> Rows:
    """Return software and machine."""
    versions = material.record.get("environment", {}).get("versions", {}) if _has_environment(material) else {}
    told = (("System", "platform"), ("Processor", "processor"), ("Python", "python"))
    rows = [(name, material.text("environment", key)) for name, key in told]
    if isinstance(versions, dict):
        rows += [(str(name), str(version)) for name, version in versions.items() if version]
    return [(name, value) for name, value in rows if value]


def git_line(material: Material) -> str:
    """Say which source code trained it."""
    git = material.record["environment"].get("git") if _has_environment(material) else None
    if not isinstance(git, dict) or not git.get("commit"):
        return "an installed package: no git checkout"
    changed = git.get("changed_files")
    return f"{git['commit']}, " + (f"with uncommitted changes in {changed} files" if changed else "nothing changed")


def command_line(material: Material) -> str:
    """Return the command that trained it, as a shell takes it; nothing where it is not known."""
    words = material.record["environment"].get("command") if _has_environment(material) else None
    if not isinstance(words, Sequence) or not words or not all(isinstance(word, str) for word in words):
        return ""
    program, *arguments = words
    return shell_command(Path(program).name if Path(program).name == "tiny-lm" else program, *arguments)


def _has_environment(material: Material) -> bool:
    return isinstance(material.record.get("environment"), dict)
