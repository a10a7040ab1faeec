"""How fast `tiny-lm train` trains, beside transformers and beside a bare loop with the same model.

    python benchmarks/train_speed.py                     # the shapes for this device, three rounds, some ten minutes
    python benchmarks/train_speed.py --shapes small --rounds 1 --steps 30

Every contender runs in a process of its own, one after the other, and all of them in every round, so that a machine
that slows down slows them all; the figure of a contender is the median of its rounds, a ratio that of the ratios
within each round. All train the same GPT-2 (no dropout) on the same windows with fused AdamW and gradient clipping.
Bare loops find their batches ready in memory; `tiny-lm train` is the command itself, with Lightning, loader, logging,
clipping and schedule, its time taken from the clock in `metrics.jsonl`.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from tiny_lm.data import BinDataConfig
from tiny_lm.data.module import BinTokenDataModule
from tiny_lm.data.tokenize import tokenize_corpus
from tiny_lm.dataset.stories import generate_stories
from tiny_lm.model import ModelConfig, build_model, flops_per_token, model_config_from_dict, num_parameters
from tiny_lm.runs import read_metrics
from tiny_lm.tokenizer import TokenizerConfig, train_tokenizer
from tiny_lm.training import TrainingConfig
from tiny_lm.training.acceleration import (
    compiled_loss,
    keep_freed_memory,
    prefers_blocked_attention,
)
from tiny_lm.training.device import choose_device
from tiny_lm.training.optim import Schedule, build_optimizer

DEVICE = choose_device()
WARM_UP = 10  # steps that are not timed: compiling, first touches of memory

# name -> (model, batch size)
SHAPES: dict[str, tuple[dict[str, Any], int]] = {
    "speed": ({"vocab_size": 8192, "context_length": 256, "d_model": 384, "n_layers": 2, "n_heads": 4}, 16),
    "small": ({"vocab_size": 2048, "context_length": 256, "d_model": 96, "n_layers": 3, "n_heads": 3}, 16),
    "speed-gpu": ({"vocab_size": 8192, "context_length": 256, "d_model": 384, "n_layers": 2, "n_heads": 4}, 256),
    "baseline-gpu": ({"vocab_size": 8192, "context_length": 512, "d_model": 640, "n_layers": 3, "n_heads": 10}, 128),
    "124m-gpu": ({"vocab_size": 50304, "context_length": 1024, "d_model": 768, "n_layers": 12, "n_heads": 12}, 32),
}
SHAPES_OF_DEVICE = {
    "cpu": ("speed", "small"),
    "mps": ("speed", "small"),
    "cuda": ("speed-gpu", "baseline-gpu", "124m-gpu"),
}

Batch = tuple[Tensor, Tensor]
LossOfBatch = Callable[[Tensor, Tensor], Tensor]


def model_config(shape: str) -> ModelConfig:
    return model_config_from_dict({"architecture": "gpt2", **SHAPES[shape][0]}, source=shape)


def data_config(shape: str, stream: Path) -> BinDataConfig:
    model, batch_size = SHAPES[shape]
    return BinDataConfig(
        train_path=str(stream / "train.bin"),
        val_path=str(stream / "val.bin"),
        block_size=model["context_length"],
        batch_size=batch_size,
        num_workers=4,  # beside a GPU
        pin_memory=True,
    )


def training_config(steps: int, precision: str, compile_it: bool) -> TrainingConfig:
    return TrainingConfig.from_dict(
        {
            "max_steps": steps,
            "learning_rate": 6e-4,
            "weight_decay": 0.1,
            "precision": precision,
            "compile": compile_it,
            "val_every_n_steps": 10**9,  # neither the peer nor the bare loop validates or saves
            "save_every_n_steps": 10**9,
            "sample_tokens": 0,
        }
    )


# --- the contenders: each returns tokens per second ------------------------------------------------------------------


def bare_loop(model: nn.Module, loss_of: LossOfBatch, batches: Iterator[Batch], steps: int, precision: str) -> float:
    """Train `model` in the shortest loop that does what training needs."""
    training = training_config(WARM_UP + steps, precision, False)
    optimizer = build_optimizer(model, training)
    schedule = Schedule(optimizer, training)
    tokens, started = 0, 0.0
    for step, (x, y) in enumerate(islice(batches, WARM_UP + steps)):
        if step == WARM_UP:
            synchronize()
            started = time.perf_counter()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = loss_of(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tokens += x.numel() if step >= WARM_UP else 0
    synchronize()
    return tokens / (time.perf_counter() - started)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def ready_batches(shape: str, stream: Path) -> Iterator[Batch]:
    """Yield the same sixteen batches again and again, on the device."""
    loader = BinTokenDataModule(data_config(shape, stream)).train_dataloader()
    return cycle([(x.to(DEVICE), y.to(DEVICE)) for x, y in islice(loader, 16)])


def transformers_loop(shape: str, stream: Path, steps: int, *, precision: str, compile_it: bool) -> float:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = model_config(shape)
    model: Any = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context_length,
            n_embd=config.d_model,
            n_layer=config.n_layers,
            n_head=config.n_heads,
            n_inner=config.ffn_size,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
    ).to(DEVICE)
    model.train()

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = model(x, labels=x).loss  # it shifts the labels itself
        return loss

    loss_of = torch.compile(loss_of) if compile_it else loss_of
    return bare_loop(model, loss_of, ready_batches(shape, stream), steps, precision)


def our_loop(shape: str, stream: Path, steps: int) -> float:
    if DEVICE == "cpu":
        keep_freed_memory()
    config = model_config(shape)
    model = build_model(config).to(DEVICE)
    if prefers_blocked_attention(DEVICE, config.context_length):
        model.use_blocked_attention()
    loss = compiled_loss()
    return bare_loop(model, lambda x, y: loss(model, x, y, -100), ready_batches(shape, stream), steps, "bf16-mixed")


def our_command(shape: str, stream: Path, steps: int) -> float:
    """Run `tiny-lm train` in this process and read the clock that it wrote."""
    from tiny_lm.cli import main

    with TemporaryDirectory() as folder:
        os.chdir(folder)
        files = {
            "model": model_config(shape),
            "training": training_config(WARM_UP + steps + 1, "bf16-mixed", True),  # the last step validates
            "data": data_config(shape, stream),
        }
        for section, config in files.items():
            config.save(Path(f"{section}.yaml"))
        sys.argv = ["tiny-lm"]
        try:
            main("train", *(f"--{section}-config={section}.yaml" for section in files), "--set=training.run_name=x")
        except SystemExit as end:
            if end.code:
                raise
        events = [event for event in read_metrics(Path("runs/x/metrics.jsonl")) if "tokens" in event]
        first, last = (next(event for event in events if event["step"] == step) for step in (WARM_UP, WARM_UP + steps))
        return float((last["tokens"] - first["tokens"]) / (last["timestamp"] - first["timestamp"]))


def transformers_eager(shape: str, stream: Path, steps: int) -> float:
    return transformers_loop(shape, stream, steps, precision="32-true", compile_it=False)


def transformers_compiled(shape: str, stream: Path, steps: int) -> float:
    return transformers_loop(shape, stream, steps, precision="bf16-mixed", compile_it=True)


def transformers_keeping_memory(shape: str, stream: Path, steps: int) -> float:
    keep_freed_memory()
    return transformers_loop(shape, stream, steps, precision="bf16-mixed", compile_it=True)


EAGER, COMPILED = "transformers, eager float32", "transformers, compiled bf16"
BARE, COMMAND = "our model in a bare loop", "tiny-lm train"
CONTENDERS: dict[str, Callable[[str, Path, int], float]] = {
    EAGER: transformers_eager,
    COMPILED: transformers_compiled,
    "the same, keeping freed memory as we do": transformers_keeping_memory,
    BARE: our_loop,
    COMMAND: our_command,
}


# --- the race --------------------------------------------------------------------------------------------------------


def run_one(contender: str, shape: str, stream: Path, steps: int) -> dict[str, float]:
    """Run one contender in this process."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    rate = CONTENDERS[contender](shape, stream, steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    if DEVICE == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    return {"tokens_per_second": rate, "peak_mib": peak}


def run_in_child(contender: str, shape: str, stream: Path, steps: int) -> dict[str, float]:
    """Run one contender in a process of its own; it prints its figures in its last line."""
    command = [sys.executable, __file__, "--contender", contender, "--shapes", shape, "--steps", str(steps)]
    child = subprocess.run([*command, "--stream", str(stream)], capture_output=True, text=True)
    if child.returncode:
        sys.exit(f"{contender} failed on {shape}:\n{child.stderr[-3000:]}")
    result: dict[str, float] = json.loads(child.stdout.splitlines()[-1])
    return result


def write_stream(folder: Path) -> Path:
    """Write a token stream of built-in stories that every vocabulary of SHAPES has room for."""
    stories = list(generate_stories(6000, seed=0))
    tokenizer = train_tokenizer(TokenizerConfig(name="bench", vocab_size=2048, dataset_config="stories"), stories)
    tokenize_corpus(tokenizer, {"train": stories[100:], "val": stories[:100]}, folder, source="benchmark")
    return folder


def race(shape: str, stream: Path, steps: int, rounds: int) -> dict[str, Any]:
    """Run all contenders on one shape and print their table."""
    names = list(CONTENDERS) if shape != "small" else [BARE, COMMAND]
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            results[name].append(run_in_child(name, shape, stream, steps))
    rates = {name: median(result["tokens_per_second"] for result in results[name]) for name in names}
    config = model_config(shape)
    batch, length = SHAPES[shape][1], config.context_length
    print(f"\n{shape}: GPT-2 of {num_parameters(config):,} parameters, batches of {batch} x {length} tokens")
    for name in names:
        peak = max(result["peak_mib"] for result in results[name])
        flops = rates[name] * flops_per_token(config, length)
        print(f"  {name:<42} {rates[name]:>12,.0f} tokens/s  {flops / 1e12:>7.2f} TFLOP/s  {peak:>7,.0f} MiB at most")
    for name in names[:-1]:
        pairs = zip(results[COMMAND], results[name], strict=True)
        ratio = median(ours["tokens_per_second"] / theirs["tokens_per_second"] for ours, theirs in pairs)
        print(f"  {COMMAND} / {name:<40} {ratio:.2f} x", flush=True)
    return {"shape": shape, "contenders": results, "medians": rates}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=SHAPES_OF_DEVICE[DEVICE])
    parser.add_argument("--steps", type=int, default=None, help="timed steps; default: 30, and 300 for the small shape")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all figures here, too")
    parser.add_argument("--contender", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--stream", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def describe_machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if DEVICE == "cuda" else None
    return {"device": gpu or f"CPU, {os.cpu_count()} cores, {platform.machine()}", "torch": torch.__version__}


def main() -> None:
    arguments = parse_arguments()
    if arguments.contender:
        [shape] = arguments.shapes
        print(json.dumps(run_one(arguments.contender, shape, arguments.stream, arguments.steps)))
        return
    machine = describe_machine()
    print(f"{machine['device']}, torch {machine['torch']}, {time.strftime('%Y-%m-%d')}", flush=True)
    with TemporaryDirectory() as folder:
        stream = write_stream(Path(folder))
        results = [
            race(shape, stream, arguments.steps or (300 if shape == "small" else 30), arguments.rounds)
            for shape in arguments.shapes
        ]
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")
    if DEVICE != "cuda":
        print("\nno GPU here: the shapes for GPUs were not run")


if __name__ == "__main__":
    main()
