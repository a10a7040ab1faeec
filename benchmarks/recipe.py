"""What a recipe learns: the documented one beside ours, from the same text, in the same number of tokens.

    python benchmarks/recipe.py TEXTS                # 500 steps of 4,096 tokens each, some ten minutes
    python benchmarks/recipe.py TEXTS --batch-size 128 --profiles speed turbo-qwen   # the speed tier: 16.4M tokens

TEXTS is a folder with `train.txt` and `valid.txt`, stories separated by `<|endoftext|>`. A tokenizer of 8,192 tokens is
trained on the first; every profile is then trained by `tiny-lm train` itself. The time is that of the whole command
without the validation of the result. Losses compare only with others of the same tokenizer and text; bits per byte do
across tokenizers.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PROFILES = ("speed", "turbo", "turbo-llama", "turbo-qwen")


def command(*words: str, cwd: Path) -> None:
    code = "from tiny_lm.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"tiny-lm {' '.join(words)} failed:\n{done.stderr[-3000:]}")


def write_streams(texts: Path, folder: Path) -> None:
    (folder / "texts.yaml").write_text(
        f"name: {texts.resolve()}\nsource: local\nsplits: {{train: train.txt, validation: valid.txt}}\n"
    )
    (folder / "ours.yaml").write_text("name: ours\nvocab_size: 8192\ndataset_config: texts.yaml\n")
    command("tokenizer", "train", "--config", "ours.yaml", cwd=folder)
    command("tokenize", "--config", "ours.yaml", cwd=folder)


def train(profile: str, steps: int, batch_size: int, folder: Path) -> dict[str, Any]:
    settings = {
        "data.train_path": "data/ours-tokenized/train.bin",
        "data.val_path": "data/ours-tokenized/val.bin",
        "data.batch_size": batch_size,
        "training.max_steps": steps,
        "training.val_every_n_steps": 10**6,  # only the result is validated
        "training.sample_tokens": 0,
        "training.run_name": profile,
    }
    started = time.perf_counter()
    command("train", profile, *(f"--set={key}={value}" for key, value in settings.items()), cwd=folder)
    seconds = time.perf_counter() - started
    record: dict[str, Any] = json.loads((folder / "runs" / profile / "run.json").read_text())
    metrics = record["metrics"]
    return {
        "parameters": record["parameters"],
        "tokens": record["tokens"],
        "seconds": seconds - metrics["val_seconds"],
        "val_loss": metrics["val_loss"],
        "val_bpb": metrics["val_bpb"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--profiles", nargs="+", default=PROFILES)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=16, help="windows of 256 tokens in a step")
    parser.add_argument("--json", type=Path, help="write all figures here, too")
    arguments = parser.parse_args()
    results = {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_streams(arguments.texts, folder)
        print(f"{'profile':<14} {'parameters':>11} {'tokens':>12} {'time':>8} {'val loss':>9} {'bits/byte':>10}")
        for profile in arguments.profiles:
            result = results[profile] = train(profile, arguments.steps, arguments.batch_size, folder)
            print(
                f"{profile:<14} {result['parameters']:>11,} {result['tokens']:>12,} {result['seconds']:>6.0f} s "
                f"{result['val_loss']:>9.4f} {result['val_bpb']:>10.4f}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
