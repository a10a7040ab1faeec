"""How fast texts are generated, beside transformers, llama.cpp and ONNX Runtime with the same weights.

    python benchmarks/generate_speed.py RUN              # a run folder; nine rounds, some four minutes
    python benchmarks/generate_speed.py RUN --rounds 3 --json result.json

Every contender is a process of its own that waits for its turn: all of them do one kind of work, one after the other,
then the next kind, and so on in every round. So two figures that are compared were measured within seconds of each
other, on whatever the machine was at that moment. A figure is the median of the rounds, a ratio that of the ratios
within each round. All continue the same prompts by the same number of tokens in float32, twice, and the second time
counts. Ours runs as it is, and once more with a compiled step for single texts (`--compile`); transformers by
`generate` on the export of the run, llama.cpp (where llama-cpp-python is installed) on its GGUF file, ONNX Runtime
(where the extra `onnx` is installed) by the program that stands beside its graphs, and once more with weights of eight
bits. Loading and compiling are not timed; reading the prompt is.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from contender import Contender, take_turns

TOKENS = 128  # for each text
PROMPT = "Once upon a time, there was a little"
TEMPERATURES = {"greedy": 0.0, "temperature 0.8": 0.8}
BATCHES = (1, 32)

Rates = dict[str, float]
"""Tokens per second of each kind of work."""
Generate = Callable[[int, float], None]
"""Continues so many copies of the prompt by TOKENS tokens each, at a temperature."""


def ours(run: Path, *, compile_it: bool = False) -> Generate:
    from tiny_lm.inference import GenerationConfig, TextGenerator

    generator = TextGenerator.from_run(run)
    if compile_it:
        generator.compile()

    def generate(batch: int, temperature: float) -> None:
        request = GenerationConfig(max_new_tokens=TOKENS, min_new_tokens=TOKENS, temperature=temperature)
        texts = generator.generate_batch([PROMPT] * batch, request, seed=list(range(batch)))
        assert all(len(text.ids) == TOKENS for text in texts)

    return generate


def transformers(folder: Path) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = AutoTokenizer.from_pretrained(folder)([PROMPT], return_tensors="pt")

    def generate(batch: int, temperature: float) -> None:
        ids = inputs["input_ids"].repeat(batch, 1)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        texts = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, min_new_tokens=TOKENS, **sampling
        )
        assert texts.shape == (batch, ids.shape[1] + TOKENS)

    return generate


def llama_cpp(file: Path) -> Generate:
    from llama_cpp import Llama

    model = Llama(str(file), n_ctx=256, n_threads=os.cpu_count(), verbose=False)
    prompt = model.tokenize(PROMPT.encode())

    def generate(batch: int, temperature: float) -> None:
        assert batch == 1
        options = {"temp": temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}
        tokens = model.generate(prompt, reset=True, **options)  # goes on beyond the end of the text
        for _ in range(TOKENS):
            next(tokens)

    return generate


def onnx_runtime(folder: Path, file: str) -> Generate:
    from tiny_lm.export.onnx_generate import OnnxModel

    model = OnnxModel(folder, file, threads=os.cpu_count() or 1)
    model.settings["eos_token_id"] = -1  # goes on beyond the end of the text
    prompt = model.tokenizer.encode(PROMPT).ids

    def generate(batch: int, temperature: float) -> None:
        assert batch == 1
        assert sum(1 for _ in model.stream(prompt, TOKENS, temperature=temperature, seed=0)) == TOKENS

    return generate


OURS, OURS_COMPILED = "tiny-lm", "tiny-lm --compile"
TRANSFORMERS, LLAMA_CPP = "transformers generate", "llama.cpp"
FLOAT32, INT8 = "onnx/model.onnx", "onnx/model_quantized.onnx"
ONNX, ONNX_QUANTIZED = "ONNX Runtime", "ONNX Runtime, int8"
CONTENDERS: dict[str, Callable[[Path, Path], Generate]] = {
    TRANSFORMERS: lambda run, exports: transformers(exports / "huggingface"),
    LLAMA_CPP: lambda run, exports: llama_cpp(exports / "model.gguf"),
    ONNX: lambda run, exports: onnx_runtime(exports / "onnx", FLOAT32),
    ONNX_QUANTIZED: lambda run, exports: onnx_runtime(exports / "onnx", INT8),
    OURS: lambda run, exports: ours(run),
    OURS_COMPILED: lambda run, exports: ours(run, compile_it=True),
}
MANY = (TRANSFORMERS, OURS)
"""Those that continue several texts at once."""


def export(run: Path, folder: Path) -> None:
    from tiny_lm.export.gguf_file import write_gguf
    from tiny_lm.export.gguf_vocabulary import to_gguf_vocabulary
    from tiny_lm.export.huggingface import write_huggingface
    from tiny_lm.export.onnx import write_onnx
    from tiny_lm.export.source import load_source

    source = load_source(run)
    (folder / "huggingface").mkdir()
    write_huggingface(source, folder / "huggingface")
    write_gguf(source, to_gguf_vocabulary(source.tokenizer, source.config.vocab_size), folder / "model.gguf", "F32")
    if installed(ONNX):
        (folder / "onnx").mkdir()
        write_onnx(source, folder / "onnx")


def installed(name: str) -> bool:
    needed = {LLAMA_CPP: "llama_cpp", ONNX: "onnxscript", ONNX_QUANTIZED: "onnxscript"}
    return name not in needed or find_spec(needed[name]) is not None


def timed(generate: Generate) -> Callable[[int, float], float]:
    """Return what generates twice and returns the seconds of the second time."""

    def work(batch: int, temperature: float) -> float:
        generate(batch, temperature)
        started = time.perf_counter()
        generate(batch, temperature)
        return time.perf_counter() - started

    return work


def race(run: Path, rounds: int) -> dict[str, list[Rates]]:
    names = [name for name in CONTENDERS if installed(name)]
    results: dict[str, list[Rates]] = {name: [{} for _ in range(rounds)] for name in names}
    with TemporaryDirectory() as folder, ExitStack() as stack:
        export(run, Path(folder))
        contenders: dict[str, Contender] = {}
        for name in names:
            words = (run, "--contender", name, "--exports", folder)
            contenders[name] = stack.enter_context(Contender(Path(folder) / f"{name}.log", __file__, *words))
            contenders[name].wait_until_ready()
        for number in range(rounds):
            for batch in BATCHES:
                for kind, temperature in TEMPERATURES.items():
                    for name in names if batch == 1 else MANY:
                        rate = batch * TOKENS / contenders[name].turn(batch, temperature)
                        results[name][number][f"{batch} text{'s' * (batch > 1)}, {kind}"] = rate
    return results


def print_table(results: dict[str, list[Rates]]) -> None:
    for work in results[OURS][0]:
        print(f"\n{work}")
        contenders = {name: rounds for name, rounds in results.items() if work in rounds[0]}
        for name, rounds in contenders.items():
            line = f"  {name:<24} {median(rates[work] for rates in rounds):>8,.0f} tokens/s"
            if name not in (OURS, OURS_COMPILED):
                for own in (OURS, OURS_COMPILED):
                    if own in contenders:
                        pairs = zip(contenders[own], rounds, strict=True)
                        line += f"   {own}: {median(a[work] / b[work] for a, b in pairs):.2f} x"
            print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write all figures here, too")
    parser.add_argument("--contender", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--exports", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        take_turns(timed(CONTENDERS[arguments.contender](arguments.run, arguments.exports)))
        return
    from machine import machine  # loads torch, which not every contender needs

    print(machine(), flush=True)
    results = race(arguments.run, arguments.rounds)
    print_table(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
