"""What becomes of a model in each format: size, bits per weight, perplexity, and how fast its program generates.

    python benchmarks/export_formats.py RUN              # a run folder; nine rounds, some four minutes
    python benchmarks/export_formats.py RUN --rounds 3 --json result.json

Each format is written by `tiny-lm export`, which proves it, and run by the program that it is for: safetensors by
transformers, GGUF by llama.cpp, ONNX by ONNX Runtime (those of them that are installed), the run itself by tiny-lm.
Perplexity is that of the run's validation text, over the windows that exports are checked on. The speed is that of one
text, greedy, 128 tokens, as in `generate_speed.py`: every contender is a process of its own, and they take turns; its
figure is the median of the rounds. Loading is not timed; reading the prompt is.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from contender import Contender, take_turns
from generate_speed import (
    FLOAT32,
    INT8,
    LLAMA_CPP,
    ONNX,
    TEMPERATURES,
    TOKENS,
    Generate,
    installed,
    llama_cpp,
    onnx_runtime,
    ours,
    timed,
)
from generate_speed import transformers as transformers_generate
from machine import machine

GGUF_TYPES = ("F32", "F16", "Q8_0", "Q4_0", "Q4_K_M")
ONNX_FILES = {FLOAT32: "float32", INT8: "int8"}
GREEDY = TEMPERATURES["greedy"]


@dataclass
class Row:
    """One format: the file in the folder of the exports (none for the run itself), and what is known of it."""

    name: str
    program: str
    file: str
    bytes: int
    bits_per_weight: float
    perplexity: float = 0.0
    tokens_per_sec: float = 0.0


def export(run: Path, folder: Path, form: str, *options: str) -> dict[str, dict[str, float]]:
    """Export by the command, and return what its report says of each file."""
    words = ["export", form, str(run), "--output-dir", str(folder / form), *options]
    code = "from tiny_lm.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"tiny-lm {' '.join(words)} failed:\n{done.stderr[-3000:]}")
    files: dict[str, dict[str, float]] = json.loads((folder / form / "verification.json").read_text())["files"]
    return files


def write_formats(run: Path, folder: Path) -> list[Row]:
    """Export into ``folder`` whatever can be exported and run here."""
    from tiny_lm.export.source import load_source
    from tiny_lm.model import num_parameters

    parameters = num_parameters(load_source(run).config)
    rows = [Row("checkpoint, weights alone, float32", "tiny-lm", "", 4 * parameters, 32.0)]
    export(run, folder, "huggingface")
    size = (folder / "huggingface" / "model.safetensors").stat().st_size
    rows.append(Row("safetensors, float32", "transformers", "huggingface", size, 8 * size / parameters))
    if installed(LLAMA_CPP):
        files = export(run, folder, "gguf", "--outtype", "f32", "--quantize", ",".join(GGUF_TYPES[1:]))
        for kind, (name, facts) in zip(GGUF_TYPES, files.items(), strict=True):
            rows.append(Row(f"GGUF {kind}", "llama.cpp", f"gguf/{name}", int(facts["bytes"]), facts["bits_per_weight"]))
    if installed(ONNX):
        files = export(run, folder, "onnx")
        for name, kind in ONNX_FILES.items():
            facts = files[name]
            rows.append(
                Row(f"ONNX {kind}", "onnxruntime", f"onnx/{name}", int(facts["bytes"]), facts["bits_per_weight"])
            )
    return rows


# --- one format, in a process of its own -----------------------------------------------------------------------------


def program(row: Row, run: Path, exports: Path) -> Generate:
    programs: dict[str, Callable[[], Generate]] = {
        "tiny-lm": lambda: ours(run),
        "transformers": lambda: transformers_generate(exports / row.file),
        "llama.cpp": lambda: llama_cpp(exports / row.file),
        "onnxruntime": lambda: onnx_runtime(exports / "onnx", row.file.removeprefix("onnx/")),
    }
    return programs[row.program]()


def measure_perplexity(row: Row, run: Path, exports: Path) -> float:
    from tiny_lm.export.llamacpp_engine import LlamaCppEngine
    from tiny_lm.export.source import load_source
    from tiny_lm.export.transformers_engine import TransformersEngine
    from tiny_lm.export.verify import Engine, OwnEngine, perplexity

    source = load_source(run)

    def onnx_engine() -> Engine:
        from tiny_lm.export.onnx_engine import OnnxEngine

        return OnnxEngine(exports / "onnx", row.file.removeprefix("onnx/"), source)

    engines: dict[str, Callable[[], Engine]] = {
        "tiny-lm": lambda: OwnEngine(source),
        "transformers": lambda: TransformersEngine(exports / row.file),
        "llama.cpp": lambda: LlamaCppEngine(exports / row.file, source),
        "onnxruntime": onnx_engine,
    }
    return perplexity(source, engines[row.program]())


# --- all of them -----------------------------------------------------------------------------------------------------


def text_of(run: Path) -> str:
    from tiny_lm.export.source import load_source

    return load_source(run).validation.origin


def measure(run: Path, rounds: int) -> list[Row]:
    with TemporaryDirectory() as folder, ExitStack() as stack:
        rows = write_formats(run, Path(folder))
        for row in rows:
            row.perplexity = measure_perplexity(row, run, Path(folder))
        contenders: dict[str, Contender] = {}
        for row in rows:
            words = (run, "--row", json.dumps(asdict(row)), "--exports", folder)
            contenders[row.name] = stack.enter_context(Contender(Path(folder) / f"{row.name}.log", __file__, *words))
            contenders[row.name].wait_until_ready()
        seconds = [{name: each.turn(1, GREEDY) for name, each in contenders.items()} for _ in range(rounds)]
        for row in rows:
            row.tokens_per_sec = TOKENS / median(each[row.name] for each in seconds)
    return rows


def print_table(rows: list[Row]) -> None:
    print("| file | MB | bits per weight | perplexity | program | tokens/s |\n|---|---|---|---|---|---|")
    for row in rows:
        figures = f"{row.bytes / 1e6:.1f} | {row.bits_per_weight:.1f} | {row.perplexity:.3f}"
        print(f"| {row.name} | {figures} | {row.program} | {row.tokens_per_sec:,.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write all figures here, too")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--exports", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        take_turns(timed(program(Row(**json.loads(arguments.row)), arguments.run, arguments.exports)))
        return
    print(f"{machine()}; perplexity on {text_of(arguments.run)}\n", flush=True)
    rows = measure(arguments.run, arguments.rounds)
    print_table(rows)
    if arguments.json:
        figures = {"machine": machine(), "text": text_of(arguments.run), "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
