"""GGUF files for llama.cpp and what is built on it (Ollama, LM Studio, llama-server)."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tiny_lm.errors import UserError
from tiny_lm.export.agreement import Reference, check_settings
from tiny_lm.export.gguf_file import (
    BLOCKS,
    FileFacts,
    expected_settings,
    import_gguf,
    read_facts,
    read_settings,
    row_lengths,
    weight_errors,
    write_gguf,
)
from tiny_lm.export.gguf_vocabulary import Vocabulary, to_gguf_vocabulary
from tiny_lm.export.huggingface import check_space
from tiny_lm.export.llamacpp_engine import LlamaCppEngine, import_llama_cpp, quantize_file
from tiny_lm.export.source import ExportSource
from tiny_lm.export.verify import (
    REPORT_FILE,
    Check,
    Engine,
    OwnEngine,
    check_greedy,
    check_perplexity,
    check_tokens,
    perplexity,
    raise_on_failure,
    write_report,
)
from tiny_lm.files import atomic_folder, check_free, write_text
from tiny_lm.model import ModelConfig, num_parameters

K_QUANTS = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K")
"""Types quantized by llama.cpp itself; blocks of 256 weights."""

_FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_LIMITS = {"F16": 0.01, "BF16": 0.01, "Q8_0": 0.01}
"""Maximum increase of the perplexity; coarser types have no limit, only a report."""

_WEIGHT_ERRORS = {"F16": 2**-10, "BF16": 2**-7, "Q8_0": 0.02}
_COARSE_WEIGHT_ERROR = 0.5
"""Maximum rounding error relative to a tensor's norm: two bits reach a third, an unrelated tensor 1.4."""


@dataclass(frozen=True)
class GGUFFile:
    """A written file: name, contents, and checks."""

    name: str
    facts: FileFacts
    checks: list[Check]


def check_kinds(kinds: Sequence[str]) -> list[str]:
    """Return the type names in upper case, without duplicates.

    Raises:
        UserError: a name is unknown, or the list is empty.
    """
    known = (*BLOCKS, *K_QUANTS)
    chosen = list(dict.fromkeys(kind.upper() for kind in kinds if kind))
    for kind in chosen:
        if kind not in known:
            raise UserError(f"{kind}: unknown GGUF type; choose from: {', '.join(known)}")
    if not chosen:
        raise UserError(f"name at least one GGUF type: {', '.join(known)}")
    return chosen


def quantization_warnings(config: ModelConfig, kinds: Sequence[str]) -> list[str]:
    """Describe which rows do not fit the blocks of the chosen types, and which types are used instead."""
    lines = []
    for length, names in sorted(row_lengths(config).items()):
        what = f"{len(names)} tensors have rows of {length} numbers"
        coarse = [kind for kind in kinds if kind in K_QUANTS]
        if coarse and length % 32 == 0 and length % 256:
            instead = ", ".join(f"{kind[:4]}: {_FALLBACKS[kind[:4]]}" for kind in coarse)
            lines.append(
                f"{what}, not a multiple of 256, so {', '.join(coarse)} will be larger than the name says: "
                f"llama.cpp uses other types there ({instead}; the embedding Q8_0)"
            )
        blocked = [kind for kind in kinds if BLOCKS.get(kind, 256) > 1]
        if blocked and length % 32:
            lines.append(f"{what}, not a multiple of 32: they stay F16 in {', '.join(blocked)}")
    return lines


def export_gguf(
    source: ExportSource,
    folder: Path,
    kinds: Sequence[str],
    *,
    form: str = "gguf",
    beside: Mapping[str, str] | None = None,
    force: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> list[GGUFFile]:
    """Write a GGUF file of each type, run each in llama.cpp, and compare.

    A float32 file is always written and verified, since it shows that names, shapes and order are right; it is kept
    only if requested. The others are checked by their token ids and perplexity.

    Args:
        source: what to export.
        folder: output folder.
        kinds: GGUF types, such as ``F16`` or ``Q4_K_M``.
        form: name of the format in the report.
        beside: further text files to write, by name.
        force: replace an earlier export.
        log: called with warnings about the chosen types.

    Returns:
        the files; the float32 one comes first, whether it is kept or not.

    Raises:
        UserError: the folder is not empty, the disk is full, an extra is missing, llama.cpp does not support this
            model, or a check failed.
    """
    replaceable = REPORT_FILE if force else None
    check_free(folder, replaceable=replaceable)
    import_gguf()
    import_llama_cpp()
    kinds = check_kinds(kinds)
    vocabulary = to_gguf_vocabulary(source.tokenizer, source.config.vocab_size)
    check_model(source.config)
    check_space(folder, num_parameters(source.config) * 4 * (1 + len(kinds)))
    for line in quantization_warnings(source.config, kinds):
        log(line)
    with atomic_folder(folder, replaceable=replaceable) as temporary:
        files = _write_files(source, vocabulary, temporary, kinds)
        for name, text in (beside or {}).items():
            write_text(temporary / name, text)
        write_report(temporary, source, form, {file.name: _describe(file) for file in files})
    return files


def check_model(config: ModelConfig) -> None:
    """Raise UserError if llama.cpp does not support the model."""
    if config.architecture == "qwen3" and config.qkv_bias:
        raise UserError("llama.cpp's qwen3 has no biases on q, k and v: train with qkv_bias: false, or as llama3")


def _write_files(source: ExportSource, vocabulary: Vocabulary, folder: Path, kinds: Sequence[str]) -> list[GGUFFile]:
    own = OwnEngine(source)
    original = perplexity(source, own)
    base = folder / file_name(source, "F32")
    write_gguf(source, vocabulary, base, "F32")
    files = [GGUFFile(base.name, read_facts(base), _verify(source, own, base))]
    raise_on_failure(base.name, files[0].checks)
    for kind in kinds:
        if kind == "F32":
            continue
        file = folder / file_name(source, kind)
        if kind in K_QUANTS:
            quantize_file(base, file, import_gguf().LlamaFileType[f"MOSTLY_{kind}"])
        else:
            write_gguf(source, vocabulary, file, kind)
        engine = LlamaCppEngine(file, source)
        checks = [_check_weights(source, file, kind), *check_tokens(source, own, engine)]
        checks.append(check_perplexity(source, original, engine, limit=_LIMITS.get(kind)))
        engine.close()
        files.append(GGUFFile(file.name, read_facts(file), checks))
        raise_on_failure(file.name, checks)
    if "F32" not in kinds:
        base.unlink()
    return files


def _verify(source: ExportSource, own: OwnEngine, file: Path) -> list[Check]:
    engine = LlamaCppEngine(file, source)
    reference = llama_cpp_reference(source, engine)
    checks = [check_settings(expected_settings(source.config), read_settings(file, source.config))]
    checks += check_tokens(source, own, engine)
    checks += reference.check(engine)
    checks.append(check_greedy(source, own, engine, reference.difference_limit))
    checks.append(check_perplexity(source, perplexity(source, own), engine, limit=0.001))
    engine.close()
    return checks


def _check_weights(source: ExportSource, file: Path, kind: str) -> Check:
    """Compare a file's weights with the model's: only rounding may change them."""
    errors = weight_errors(source, file)
    worst = max(errors, key=lambda name: errors[name])
    limit = _WEIGHT_ERRORS.get(kind, _COARSE_WEIGHT_ERROR)
    result = f"{errors[worst]:.2%} away in {worst}"
    return Check("weights read back", errors[worst], result, f"{limit:.2%}", errors[worst] <= limit)


def llama_cpp_reference(source: ExportSource, engine: Engine) -> Reference:
    """Return the reference for a llama.cpp ``engine``: with GELU from a lookup table if it uses one.

    llama.cpp does so on a CPU only, so the reference that agrees better is used.
    """
    exact = Reference(source)
    if source.config.architecture not in ("gpt2", "smalllm"):
        return exact
    return min(exact, Reference(source, table_gelu=True), key=lambda reference: reference.agreement(engine).rms)


def file_name(source: ExportSource, kind: str) -> str:
    """Return the conventional file name: model, then type in upper case."""
    return f"{source.name}-{kind}.gguf".replace(os.sep, "-")


def _describe(file: GGUFFile) -> dict[str, Any]:
    return {"engine": "llama.cpp", **asdict(file.facts), "checks": file.checks}
