"""Our model as an ONNX graph, and the same graph with 8-bit weights.

Shapes: B rows, P cached tokens (the past), T new tokens, S = P + T, G key and value heads, K head size,
V vocabulary.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tiny_lm.errors import UserError
from tiny_lm.files import atomic_path
from tiny_lm.model import KVCache, ModelConfig, Transformer

OPSET = 20
"""Opset of the graph: the first with a GELU operator, supported by ONNX Runtime since 1.17."""

_EXAMPLE = {"batch": 2, "past": 4, "sequence": 3}  # not 0 or 1, which the exporter would specialize


@dataclass(frozen=True)
class GraphFacts:
    """Properties of a file.

    Attributes:
        opset: version of the standard operators.
        bytes: size of the file.
        bits_per_weight: of the whole file; the embedding, which is the head as well, counts once.
    """

    opset: int
    bytes: int
    bits_per_weight: float


def import_onnx() -> Any:
    """Import onnx, and check that the libraries that write and run its graphs are installed.

    Raises:
        UserError: one of the libraries is not installed.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401  # only check that it is installed
        import onnxscript  # noqa: F401  # torch's exporter needs it
        import tokenizers  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"an ONNX export needs {error.name}, which is not installed: pip install 'tiny-lm[onnx]'"
        ) from None
    return onnx


class _PassedCache(KVCache):
    """A KV cache whose tensors are inputs and outputs, for stateless graphs.

    Positions and mask follow from the attention mask: a token's position is the number of real tokens before it, and
    no token attends to padding. So rows may be padded on either side, and in between.
    """

    def __init__(self, attention_mask: Tensor, past: Sequence[Tensor]) -> None:
        """Take the mask, int64 [B, S], 1: token, 0: padding; and keys and values of each layer in turn [B, G, P, K]."""
        # Not super().__init__(), which would allocate a fixed size.
        self.attention_mask, self.past = attention_mask, past
        self.present: list[Tensor] = []

    def prepare(self, batch_size: int, count: int) -> tuple[Tensor, Tensor | None]:
        """Return positions [B, T] of the last ``count`` tokens, and the mask [B, 1, T, S]."""
        positions = (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)[:, -count:]
        indices = torch.arange(self.attention_mask.shape[1])
        own = indices[-count:, None]  # [T, 1]
        real = self.attention_mask.bool()[:, None, None, :]  # [B, 1, 1, S]
        # Padding attends to itself: a row that attends to nothing would become NaN and spread.
        return positions, (real & (indices <= own)) | (indices == own)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append new ``keys`` and ``values`` [B, G, T, K] to those of the past."""
        if self.past:
            keys = torch.cat((self.past[2 * layer], keys), dim=2)
            values = torch.cat((self.past[2 * layer + 1], values), dim=2)
        self.present += [keys, values]
        return keys, values

    def advance(self, count: int) -> None:
        """Do nothing: the caller of the graph keeps the lengths."""


class _CachedGraph(nn.Module):
    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        cache = _PassedCache(attention_mask, past)
        return (self.model(input_ids, cache), *cache.present)


class _PlainGraph(nn.Module):
    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids, _PassedCache(attention_mask, []))
        return logits


def write_graph(model: Transformer, config: ModelConfig, file: Path, *, cached: bool) -> None:
    """Write the model as a graph with dynamic batch size and lengths.

    Inputs are ``input_ids`` [B, T] and ``attention_mask`` [B, S], both int64, and with a cache
    ``past_key_values.{i}.key`` and ``.value``, float32 [B, G, P, K], where P may be 0. Outputs are ``logits``, float32
    [B, T, V], and with a cache ``present.{i}.key`` and ``.value`` [B, G, S, K]. Positions are counted from the mask.

    Args:
        model: in evaluation mode, float32, on the CPU.
        config: of the model.
        file: to write; weights are stored inside.
        cached: with keys and values of earlier tokens as inputs and outputs.

    Raises:
        UserError: a library is not installed, or the file could not be written.
    """
    onnx = import_onnx()
    axis = torch.export.Dim
    batch, sequence = axis("batch"), axis("sequence", max=config.context_length)
    sizes = {**_EXAMPLE, "sequence": min(_EXAMPLE["sequence"], config.context_length)}
    past_length = sizes["past"] if cached else 0
    input_ids = torch.zeros(sizes["batch"], sizes["sequence"], dtype=torch.int64)
    attention_mask = torch.ones(sizes["batch"], past_length + sizes["sequence"], dtype=torch.int64)
    shapes: dict[str, Any] = {"input_ids": {0: batch, 1: sequence}, "attention_mask": {0: batch, 1: sequence}}
    names = [f"{i}.{kind}" for i in range(config.n_layers) for kind in ("key", "value")] if cached else []
    arguments: tuple[Any, ...] = (input_ids, attention_mask)
    if cached:
        shape = (sizes["batch"], config.kv_heads, past_length, config.head_size)
        arguments = (*arguments, [torch.zeros(shape) for _ in names])
        shapes["attention_mask"] = {0: batch, 1: axis("total")}
        shapes["past"] = [{0: batch, 2: axis("past")} for _ in names]
    with _quiet():
        program = torch.onnx.export(
            _CachedGraph(model).eval() if cached else _PlainGraph(model).eval(),
            arguments,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=["input_ids", "attention_mask", *(f"past_key_values.{name}" for name in names)],
            output_names=["logits", *(f"present.{name}" for name in names)],
            opset_version=OPSET,
            verbose=False,
        )
        assert program is not None  # it never is with dynamo
        proto = program.model_proto
    _strip(proto)
    with atomic_path(file) as temporary:
        onnx.save(proto, temporary)


def _strip(model: Any) -> None:
    """Remove debugging metadata, which is larger than the graph and names folders of this machine."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's messages on deprecations and optional libraries."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def quantize_graph(source: Path, target: Path) -> None:
    """Write a copy with 8-bit matrices; activations are quantized to 8 bits at run time.

    The embedding, with a tied head, stays one tensor. Norms, biases, positions and attention stay float32.

    Args:
        source: a float32 graph that :func:`write_graph` wrote.
        target: to write.

    Raises:
        UserError: a library is not installed.
    """
    onnx = import_onnx()
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    model = onnx.load(source)
    kept = _kept_nodes(model.graph)
    add_pre_process_metadata(model)  # the exporter has already folded and named what ONNX Runtime requires
    quantize_dynamic(
        model,
        target,
        # Products of unsigned bytes: those of signed ones overflow on x86 processors without VNNI.
        weight_type=QuantType.QUInt8,
        nodes_to_exclude=kept,
        # The head uses the transposed embedding, which the quantizer does not see as a constant.
        extra_options={"MatMulConstBOnly": False},
    )


def _kept_nodes(graph: Any) -> list[str]:
    """Return the nodes that must not be quantized: attention and position tables."""
    weights = {tensor.name for tensor in graph.initializer}
    turned = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Transpose"}
    kept = []
    for node in graph.node:
        right = node.input[1] if node.op_type == "MatMul" else ""
        attention = node.op_type == "MatMul" and right not in weights and turned.get(right) not in weights
        is_embedding = node.op_type == "Gather" and (
            node.input[0] in turned.values() or node.input[1] == "input_ids"  # tied to the head, or a separate table
        )
        positions = node.op_type == "Gather" and not is_embedding
        if attention or positions:
            kept.append(node.name)
    return kept


def read_facts(file: Path, parameters: int) -> GraphFacts:
    """Read a written file back.

    Args:
        file: an ONNX file.
        parameters: of the model.
    """
    onnx = import_onnx()
    model = onnx.load(file)
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    size = file.stat().st_size
    return GraphFacts(opset, size, 8 * size / parameters)
