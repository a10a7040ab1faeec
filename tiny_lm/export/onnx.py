"""Export for ONNX Runtime and transformers.js: the model as ONNX graphs, with a program that runs them."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tiny_lm.errors import UserError
from tiny_lm.export.agreement import Reference
from tiny_lm.export.huggingface import check_space, write_settings
from tiny_lm.export.model_card import model_card
from tiny_lm.export.onnx_engine import OnnxEngine
from tiny_lm.export.onnx_graph import GraphFacts, import_onnx, quantize_graph, read_facts, write_graph
from tiny_lm.export.source import ExportSource
from tiny_lm.export.verify import (
    PROMPTS,
    REPORT_FILE,
    Check,
    OwnEngine,
    check_greedy,
    check_perplexity,
    check_tokens,
    choose_sequences,
    perplexity,
    raise_on_failure,
    write_report,
)
from tiny_lm.files import atomic_folder, check_free, write_text
from tiny_lm.model import ModelConfig, num_parameters
from tiny_lm.reading import read_text

CACHED, PLAIN, QUANTIZED = "onnx/model.onnx", "onnx/model_no_cache.onnx", "onnx/model_quantized.onnx"
"""The graphs of a folder; the first and the last have the names that transformers.js expects."""

PROGRAM = "generate.py"

_QUANTIZED_LIMIT = 0.02
"""Maximum increase of the perplexity with 8-bit weights, as a fraction."""

_MAX_FILE_SIZE = 2_000_000_000  # bytes; slightly less than protobuf's limit
_STEPS = 8
"""Tokens that padded rows decode one by one."""


@dataclass(frozen=True)
class OnnxFile:
    """A written graph: name, contents, and checks."""

    name: str
    facts: GraphFacts
    checks: list[Check]


def export_onnx(source: ExportSource, folder: Path, *, force: bool = False) -> list[OnnxFile]:
    """Write the graphs and all files they need, run them in ONNX Runtime, and compare.

    The folder appears only once every check has passed.

    Args:
        source: what to export.
        folder: to write.
        force: replace an earlier export.

    Returns:
        the graphs: with a cache, without one, and with 8-bit weights.

    Raises:
        UserError: the folder is not empty, the disk is full, the extra is missing, or a check failed.
    """
    replaceable = REPORT_FILE if force else None
    check_free(folder, replaceable=replaceable)
    import_onnx()
    check_model(source.config)
    check_space(folder, 3 * 4 * num_parameters(source.config))
    with atomic_folder(folder, replaceable=replaceable) as temporary:
        write_onnx(source, temporary)
        files = []
        for name in (CACHED, PLAIN, QUANTIZED):
            engine = OnnxEngine(temporary, name, source, cached=name != PLAIN)
            checks = _check(source, engine, name)
            facts = read_facts(temporary / name, num_parameters(source.config))
            files.append(OnnxFile(name, facts, checks))
            raise_on_failure(f"{folder / name}", checks)
        described = {file.name: {"engine": engine.name, **asdict(file.facts), "checks": file.checks} for file in files}
        write_report(temporary, source, "onnx", described)
    return files


def check_model(config: ModelConfig) -> None:
    """Raise UserError if the model cannot have dynamic lengths or its weights do not fit into one file."""
    if config.context_length < 2:
        raise UserError("a model with context_length 1 cannot have dynamic lengths: export huggingface or gguf")
    size = 4 * num_parameters(config)
    if size > _MAX_FILE_SIZE:
        raise UserError(
            f"an ONNX file can have at most {_MAX_FILE_SIZE / 1e9:.0f} GB, but the weights are {size / 1e9:.1f} GB; "
            "export huggingface or gguf"
        )


def write_onnx(source: ExportSource, folder: Path) -> None:
    """Write all files of the export into an existing, empty folder.

    Raises:
        UserError: the extra is missing, or the disk is full.
    """
    write_settings(source, folder)
    (folder / CACHED).parent.mkdir()
    write_graph(source.model, source.config, folder / CACHED, cached=True)
    write_graph(source.model, source.config, folder / PLAIN, cached=False)
    quantize_graph(folder / CACHED, folder / QUANTIZED)
    write_text(folder / PROGRAM, read_text(Path(__file__).with_name("onnx_generate.py")))
    write_text(folder / "README.md", model_card(source, library="transformers.js", use=_USE))


def _check(source: ExportSource, engine: OnnxEngine, name: str) -> list[Check]:
    own = OwnEngine(source)
    if name == QUANTIZED:
        return [check_perplexity(source, perplexity(source, own), engine, limit=_QUANTIZED_LIMIT)]
    checks = check_tokens(source, own, engine) if name == CACHED else []  # all graphs share one tokenizer.json
    reference = Reference(source)
    limit = reference.difference_limit
    checks += reference.check(engine)
    checks += [check_padding(source, own, engine, side, limit, cached=name == CACHED) for side in ("left", "right")]
    checks.append(check_greedy(source, own, engine, limit))
    return checks


def check_padding(
    source: ExportSource, own: OwnEngine, engine: OnnxEngine, side: str, limit: float, *, cached: bool
) -> Check:
    """Compare a padded batch of texts of different lengths with each text alone.

    With a cache the last tokens of each row are decoded one by one after the padded prompt.
    """
    sequence = choose_sequences(source, 1)[0]
    steps = min(_STEPS, len(sequence) // 2) if cached else 0
    longest = len(sequence) - steps
    lengths = [longest - i * longest // (len(PROMPTS) + 1) for i in range(len(PROMPTS))]
    ids = torch.zeros(len(lengths), len(sequence), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        start = longest - length if side == "left" else 0
        for part in (slice(start, start + length), slice(longest, len(sequence))):
            mask[row, part] = 1
        ids[row, mask[row].bool()] = torch.tensor(sequence[: length + steps])
    pieces = [longest, *[1] * steps]
    found = engine.batch_log_probabilities(ids, mask, pieces=pieces)
    largest = 0.0
    for row, length in enumerate(lengths):
        difference = found[row][mask[row].bool()] - own.log_probabilities(sequence[: length + steps])
        largest = max(largest, float(difference.abs().nan_to_num(nan=torch.inf).max()))
    name = f"a batch of {len(lengths)} texts padded on the {side}"
    return Check(name, largest, f"largest difference {largest:.2g}", f"{limit:.2g}", largest <= limit)


_USE = """```bash
pip install onnxruntime numpy tokenizers
python generate.py --prompt "Once upon a time"
```

In JavaScript, in a browser or Node.js:

```javascript
import { pipeline } from "@huggingface/transformers";

const generate = await pipeline("text-generation", "path/of/this/folder", { dtype: "q8" });
console.log((await generate("Once upon a time", { max_new_tokens: 200 }))[0].generated_text);
```

| file | |
|---|---|
| `onnx/model.onnx` | float32; `past_key_values.*` go in and `present.*` come out |
| `onnx/model_quantized.onnx` | the same with weights of eight bits |
| `onnx/model_no_cache.onnx` | float32; the whole text goes in each time |

Batch size and lengths are dynamic; `attention_mask` covers the past too, and positions follow from it."""
