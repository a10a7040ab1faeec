"""Write a model as a GGUF file with the ``gguf`` package: no converter script, no clone of llama.cpp."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tiny_lm.errors import UserError
from tiny_lm.export.gguf_vocabulary import Vocabulary
from tiny_lm.export.source import ExportSource
from tiny_lm.model import ModelConfig, build_model
from tiny_lm.model.huggingface_weights import to_huggingface_state, weight_mappings

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURES = {"gpt2": "gpt2", "llama3": "llama", "smalllm": "starcoder2", "qwen3": "qwen3"}
"""The equivalent architecture of llama.cpp."""

BLOCKS = {"F32": 1, "F16": 1, "BF16": 1, "Q8_0": 32, "Q4_0": 32, "Q4_1": 32, "Q5_0": 32, "Q5_1": 32}
"""Block size of each type written here; row lengths must be multiples of it."""

# Always float32: llama.cpp uses these without a matrix product.
_ALWAYS_FLOAT32 = ("position_embd.weight", "_norm.weight")


def import_gguf() -> Any:
    """Import the ``gguf`` package; raise UserError if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF needs the package gguf, which is not installed: pip install 'tiny-lm[export]'") from None
    return gguf


def gguf_tensors(config: ModelConfig, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a GGUF file by name, float32, matrices as (out, in); a tied head is the embedding.

    Args:
        config: the config of our model.
        state: our state dict.
    """
    gguf = import_gguf()
    architecture = next(
        key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[config.architecture]
    )
    names = gguf.get_tensor_name_map(architecture, config.n_layers)
    theirs = to_huggingface_state(config, state)
    for mapping in weight_mappings(config):
        name = names.get_name(mapping.theirs, try_suffixes=(".weight", ".bias"))
        assert name is not None, f"the gguf package has no name for {mapping.theirs}"
        tensor = theirs[mapping.theirs].float()
        tensor = tensor.T if mapping.transposed else tensor
        if config.architecture == "llama3" and ".attn_q." in name:
            tensor = interleave_pairs(tensor, config.n_heads)
        elif config.architecture == "llama3" and ".attn_k." in name:
            tensor = interleave_pairs(tensor, config.kv_heads)
        yield name, tensor.contiguous()


def interleave_pairs(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of a projection to q or k, [heads*K, ...], for rotary positions on adjacent pairs.

    We rotate dimension i of a head together with i + K/2; llama.cpp's ``llama`` rotates 2i together with 2i + 1.
    """
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])  # [heads, 2, K/2, ...]
    return halves.transpose(1, 2).reshape(weight.shape)


def write_gguf(source: ExportSource, vocabulary: Vocabulary, file: Path, kind: str) -> None:
    """Write one file.

    A tensor whose row length is not a multiple of its type's block size is stored as F16. In 4- and 5-bit files,
    embedding and head are Q8_0.

    Args:
        source: what to export.
        vocabulary: its tokens.
        file: to write.
        kind: one of ``BLOCKS``.

    Raises:
        UserError: the ``gguf`` package is not installed, or the file could not be written.
    """
    gguf = import_gguf()
    writer = gguf.GGUFWriter(file, ARCHITECTURES[source.config.architecture])
    _add_facts(writer, source, gguf.LlamaFileType[("ALL_" if kind == "F32" else "MOSTLY_") + kind])
    _add_vocabulary(writer, source, vocabulary)
    for name, tensor in gguf_tensors(source.config, source.model.state_dict()):
        chosen = gguf.GGMLQuantizationType[tensor_type(name, tuple(tensor.shape), kind)]
        writer.add_tensor(name, gguf.quantize(tensor.numpy(), chosen), raw_dtype=chosen)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    except OSError as error:  # from numpy, which only reports how much was written
        raise UserError(f"{file}: could not be written; is the disk full? ({error})") from error


def tensor_type(name: str, shape: tuple[int, ...], kind: str) -> str:
    """Return a tensor's type in a file of type ``kind``."""
    if len(shape) == 1 or name.endswith(_ALWAYS_FLOAT32):
        return "F32"
    if name in ("token_embd.weight", "output.weight") and kind.startswith(("Q4", "Q5")):
        kind = "Q8_0"
    return kind if shape[-1] % BLOCKS[kind] == 0 else "F16"


def _add_facts(writer: "GGUFWriter", source: ExportSource, file_type: int) -> None:
    config = source.config
    writer.add_type("model")
    writer.add_name(source.name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.ffn_size)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_vocab_size(config.vocab_size)
    if config.norm == "rmsnorm":
        writer.add_layer_norm_rms_eps(config.norm_eps)
    else:
        writer.add_layer_norm_eps(config.norm_eps)
    if config.position == "rope":
        writer.add_rope_freq_base(config.rope_theta)
        writer.add_rope_dimension_count(config.head_size)
        writer.add_key_length(config.head_size)
        writer.add_value_length(config.head_size)


def expected_settings(config: ModelConfig) -> dict[str, Any]:
    """Return the expected shape, epsilon and rotary base of a file, by llama.cpp's keys."""
    is_rms = config.norm == "rmsnorm"
    settings: dict[str, Any] = {
        "context_length": config.context_length,
        "embedding_length": config.d_model,
        "block_count": config.n_layers,
        "feed_forward_length": config.ffn_size,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.layer_norm_rms_epsilon" if is_rms else "attention.layer_norm_epsilon": config.norm_eps,
    }
    if config.position == "rope":
        settings |= {"rope.freq_base": config.rope_theta, "rope.dimension_count": config.head_size}
    return settings


def read_settings(file: Path, config: ModelConfig) -> dict[str, Any]:
    """Read the keys of :func:`expected_settings` from a GGUF file; missing ones are None."""
    reader = import_gguf().GGUFReader(file)
    fields = {key: reader.get_field(f"{ARCHITECTURES[config.architecture]}.{key}") for key in expected_settings(config)}
    return {key: None if field is None else field.contents() for key, field in fields.items()}


def _add_vocabulary(writer: "GGUFWriter", source: ExportSource, vocabulary: Vocabulary) -> None:
    tokenizer = source.tokenizer
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(False)
        writer.add_remove_extra_whitespaces(False)
        writer.add_unk_token_id(0)
    # Without it, llama.cpp would use token 11 as bos.
    writer.add_bos_token_id(tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_eot_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id)
    if source.chat_template is not None:
        writer.add_chat_template(source.chat_template)
    # Without these two, llama.cpp's default depends on the name of the split.
    writer.add_add_bos_token(tokenizer.bos_id is not None)
    writer.add_add_eos_token(False)


@dataclass(frozen=True)
class FileFacts:
    """Properties of a GGUF file.

    Attributes:
        bytes: size of the file.
        bits_per_weight: of all tensors together.
        types: number of tensors by type.
    """

    bytes: int
    bits_per_weight: float
    types: dict[str, int]


def read_facts(file: Path) -> FileFacts:
    """Read the actual properties of a GGUF file."""
    tensors = import_gguf().GGUFReader(file).tensors
    types: dict[str, int] = {}
    for tensor in tensors:
        types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + 1
    bits = 8 * sum(int(tensor.n_bytes) for tensor in tensors)
    weights = sum(int(tensor.n_elements) for tensor in tensors)
    return FileFacts(file.stat().st_size, bits / weights, types)


def weight_errors(source: ExportSource, file: Path) -> dict[str, float]:
    """Return each tensor's error: the dequantized weights of a GGUF file compared with the model's.

    The error is the norm of the difference over the norm of the weights; infinity for a tensor that the file lacks.
    """
    gguf = import_gguf()
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    errors = {}
    for name, expected in gguf_tensors(source.config, source.model.state_dict()):
        if name not in stored:
            errors[name] = math.inf
            continue
        values = torch.tensor(gguf.dequantize(stored[name].data, stored[name].tensor_type), dtype=torch.float64)
        exact = expected.double()
        norm = float(exact.norm()) or 1.0
        errors[name] = float((values.reshape(exact.shape) - exact).norm()) / norm
    return errors


def row_lengths(config: ModelConfig) -> dict[int, list[str]]:
    """Return the row lengths of quantized tensors, with the names of the tensors."""
    lengths: dict[int, list[str]] = {}
    for name, tensor in gguf_tensors(config, build_model(config, device="meta").state_dict()):
        if tensor_type(name, tuple(tensor.shape), "F16") == "F16":
            lengths.setdefault(tensor.shape[-1], []).append(name)
    return lengths
