"""How fast `tiny-lm train` trains, beside transformers and beside a bare loop with the same model.

    python benchmarks/train_speed.py                     # the shapes for this device, three rounds, some ten minutes
    python benchmarks/train_speed.py --shapes small --rounds 1 --steps 30

Every contender is a process of its own that compiles, warms up and then waits for its turns; in every round each takes
one, so that what is compared was measured within seconds. The figure of a contender is the median of its rounds, a
ratio that of the ratios within each round. All train the same GPT-2 (no dropout) on the same windows with fused AdamW
and gradient clipping. Bare loops find their batches ready in memory; a turn of `tiny-lm train` is the command itself,
with Lightning, loader, logging, clipping and schedule, its time taken from the clock in `metrics.jsonl`.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from contender import Contender, take_turns
from machine import machine
from torch import Tensor, nn

from tiny_lm.data import BinDataConfig
from tiny_lm.data.bin.data_module import BinTokenDataModule
from tiny_lm.data.tokenize import tokenize_corpus
from tiny_lm.dataset.stories import generate_stories
from tiny_lm.hardware.device import fastest_device
from tiny_lm.hardware.flops import peak_flops
from tiny_lm.model import ModelConfig, build_model, flops_per_token, model_config_from_dict, num_parameters
from tiny_lm.runs import read_metrics
from tiny_lm.tokenizer import TokenizerConfig, train_tokenizer
from tiny_lm.training import TrainingConfig
from tiny_lm.training.acceleration import keep_freed_memory, prefers_blocked_attention
from tiny_lm.training.loss import compiled_loss
from tiny_lm.training.optim import Schedule, build_optimizer

DEVICE = fastest_device()
WARM_UP = 10  # steps that are not timed: compiling, first touches of memory

# name -> (model, batch size)
SHAPES: dict[str, tuple[dict[str, Any], int]] = {
    "speed": ({"vocab_size": 8192, "context_length": 256, "d_model": 384, "n_layers": 2, "n_heads": 4}, 16),
    "small": ({"vocab_size": 2048, "context_length": 256, "d_model": 96, "n_layers": 3, "n_heads": 3}, 16),
    "speed-gpu": ({"vocab_size": 8192, "context_length": 256, "d_model": 384, "n_layers": 2, "n_heads": 4}, 256),
    "baseline-gpu": ({"vocab_size": 8192, "context_length": 512, "d_model": 640, "n_layers": 3, "n_heads": 10}, 128),
    "124m-gpu": ({"vocab_size": 50304, "context_length": 1024, "d_model": 768, "n_layers": 12, "n_heads": 12}, 32),
}
STEPS = {"speed": 30, "small": 300, "speed-gpu": 100, "baseline-gpu": 50, "124m-gpu": 30}  # timed ones of a turn
SHAPES_OF_DEVICE = {
    "cpu": ("speed", "small"),
    "mps": ("speed", "small"),
    "cuda": ("speed-gpu", "baseline-gpu", "124m-gpu"),
}

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


# --- the contenders: each gets ready, and then trains for so many steps in each of its turns -------------------------

Turn = Callable[[], float]  # -> tokens per second


def bare_loop(model: nn.Module, loss_of: LossOfBatch, shape: str, stream: Path, steps: int, precision: str) -> Turn:
    """Train `model` in the shortest loop that does what training needs."""
    training = training_config(10**6, precision, False)
    optimizer = build_optimizer(model, training)
    schedule = Schedule(optimizer, training)
    loader = BinTokenDataModule(data_config(shape, stream)).train_dataloader()
    batches = cycle([(x.to(DEVICE), y.to(DEVICE)) for x, y in islice(loader, 16)])  # ready, on the device

    def train(steps: int) -> int:
        tokens = 0
        for x, y in islice(batches, steps):
            with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = loss_of(x, y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            tokens += x.numel()
        synchronize()
        return tokens

    def turn() -> float:
        train(WARM_UP)
        started = time.perf_counter()
        return train(steps) / (time.perf_counter() - started)

    train(WARM_UP)  # compiles
    return turn


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def transformers_loop(shape: str, stream: Path, steps: int, *, precision: str, compile_it: bool) -> Turn:
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

    return bare_loop(model, torch.compile(loss_of) if compile_it else loss_of, shape, stream, steps, precision)


def our_loop(shape: str, stream: Path, steps: int) -> Turn:
    if DEVICE == "cpu":
        keep_freed_memory()
    config = model_config(shape)
    model = build_model(config).to(DEVICE)
    if prefers_blocked_attention(DEVICE, config.context_length):
        model.use_blocked_attention()
    loss = compiled_loss("bf16-mixed")
    return bare_loop(model, lambda x, y: loss(model, x, y, -100), shape, stream, steps, "bf16-mixed")


def our_command(shape: str, stream: Path, steps: int) -> Turn:
    """Run `tiny-lm train` in this process and read the clock that it wrote."""
    from tiny_lm.cli import main

    sys.argv = ["tiny-lm"]

    def train(steps: int) -> list[dict[str, Any]]:
        torch.compiler.reset()  # each run compiles as the first one does; the compiler keeps its work on the disk
        files = {
            "model": model_config(shape),
            "training": training_config(steps + 1, "bf16-mixed", True),  # the last step validates
            "data": data_config(shape, stream),
        }
        with TemporaryDirectory() as folder:
            os.chdir(folder)
            for section, config in files.items():
                config.save(Path(f"{section}.yaml"))
            try:
                main("train", *(f"--{section}-config={section}.yaml" for section in files), "--set=training.run_name=x")
            except SystemExit as end:
                if end.code:
                    raise
            return [event for event in read_metrics(Path("runs/x/metrics.jsonl")) if "tokens" in event]

    def turn() -> float:
        events = train(WARM_UP + steps)
        first, last = (next(event for event in events if event["step"] == step) for step in (WARM_UP, WARM_UP + steps))
        return float((last["tokens"] - first["tokens"]) / (last["timestamp"] - first["timestamp"]))

    train(1)
    return turn


def transformers_eager(shape: str, stream: Path, steps: int) -> Turn:
    return transformers_loop(shape, stream, steps, precision="32-true", compile_it=False)


def transformers_compiled(shape: str, stream: Path, steps: int) -> Turn:
    return transformers_loop(shape, stream, steps, precision="bf16-mixed", compile_it=True)


def transformers_keeping_memory(shape: str, stream: Path, steps: int) -> Turn:
    keep_freed_memory()
    return transformers_loop(shape, stream, steps, precision="bf16-mixed", compile_it=True)


EAGER, COMPILED, KEEPING = (
    "transformers, eager float32",
    "transformers, compiled bf16",
    "the same, keeping freed memory as we do",
)
BARE, COMMAND = "our model in a bare loop", "tiny-lm train"
CONTENDERS: dict[str, Callable[[str, Path, int], Turn]] = {
    EAGER: transformers_eager,
    COMPILED: transformers_compiled,
    KEEPING: transformers_keeping_memory,
    BARE: our_loop,
    COMMAND: our_command,
}


def contenders_of(shape: str) -> list[str]:
    if shape == "small":
        return [BARE, COMMAND]
    return [COMPILED, BARE, COMMAND] if DEVICE == "cuda" else list(CONTENDERS)


# --- the race --------------------------------------------------------------------------------------------------------

Result = dict[str, float]


def measured(turn: Turn) -> Callable[[], Result]:
    """Return what takes a turn and returns its figures."""

    def work() -> Result:
        rate = turn()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        if DEVICE == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**20
            torch.cuda.empty_cache()  # for the others
        return {"tokens_per_second": rate, "peak_mib": peak}

    torch.cuda.empty_cache()
    return work


def write_stream(folder: Path) -> Path:
    """Write a token stream of built-in stories that every vocabulary of SHAPES has room for."""
    stories = list(generate_stories(6000, seed=0))
    tokenizer = train_tokenizer(TokenizerConfig(name="bench", vocab_size=2048, dataset_config="stories"), stories)
    tokenize_corpus(tokenizer, {"train": stories[100:], "val": stories[:100]}, folder, source="benchmark")
    return folder


def race(shape: str, stream: Path, steps: int, rounds: int) -> dict[str, list[Result]]:
    """Let all contenders on one shape get ready, and then take their turns."""
    names = contenders_of(shape)
    results: dict[str, list[Result]] = {name: [] for name in names}
    with ExitStack() as stack:
        contenders: dict[str, Contender] = {}
        for number, name in enumerate(names):
            words = ("--contender", name, "--shapes", shape, "--steps", str(steps), "--stream", stream)
            contenders[name] = stack.enter_context(Contender(stream / f"{number}.log", __file__, *words))
        for contender in contenders.values():
            contender.wait_until_ready()
        for number in range(rounds):
            for name, contender in contenders.items():
                result = contender.turn()
                results[name].append(result)
                told = f"{shape}, round {number + 1}: {name}: {result['tokens_per_second']:,.0f} tokens/s"
                print(told, file=sys.stderr, flush=True)
    return results


def print_table(shape: str, results: dict[str, list[Result]]) -> None:
    config = model_config(shape)
    batch, length = SHAPES[shape][1], config.context_length
    flops = flops_per_token(config, length)
    peak = peak_flops(DEVICE, "bf16-mixed").value
    print(f"\n{shape}: GPT-2 of {num_parameters(config):,} parameters, batches of {batch} x {length} tokens")
    for name, rounds in results.items():
        rate = median(result["tokens_per_second"] for result in rounds)
        memory = max(result["peak_mib"] for result in rounds)
        share = f"  MFU {rate * flops / peak:.1%}" if DEVICE == "cuda" else ""
        work = f"{rate:>12,.0f} tokens/s  {rate * flops / 1e12:>7.2f} TFLOP/s{share}"
        print(f"  {name:<42} {work}  {memory:>7,.0f} MiB at most")
    for name, rounds in results.items():
        if name != COMMAND:
            ratios = [
                ours["tokens_per_second"] / theirs["tokens_per_second"]
                for ours, theirs in zip(results[COMMAND], rounds, strict=True)
            ]
            spread = f"({', '.join(f'{ratio:.2f}' for ratio in ratios)})"
            print(f"  {COMMAND} / {name:<40} {median(ratios):.2f} x  {spread}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=SHAPES_OF_DEVICE[DEVICE])
    steps = ", ".join(f"{name} {steps}" for name, steps in STEPS.items())
    parser.add_argument("--steps", type=int, default=None, help=f"timed steps of a turn; default: {steps}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all figures here, too")
    parser.add_argument("--contender", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--stream", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.contender:
        [shape] = arguments.shapes
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        take_turns(measured(CONTENDERS[arguments.contender](shape, arguments.stream, arguments.steps)))
        return
    print(machine(), flush=True)
    results = {}
    with TemporaryDirectory() as folder:
        stream = write_stream(Path(folder))
        for shape in arguments.shapes:
            figures = race(shape, stream, arguments.steps or STEPS[shape], arguments.rounds)
            print_table(shape, figures)
            results[shape] = figures
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")
    if DEVICE != "cuda":
        print("\nno GPU here: the shapes for GPUs were not run")


if __name__ == "__main__":
    main()
