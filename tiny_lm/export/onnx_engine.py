"""ONNX Runtime as an engine: an exported graph and ``tokenizer.json``, run by the exported program."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tiny_lm.export.onnx_graph import import_onnx
from tiny_lm.export.source import ExportSource
from tiny_lm.export.verify import greedy_decode, suppressed_tokens


class OnnxEngine:
    """Runs a graph of an export on the CPU."""

    def __init__(self, folder: Path, file: str, source: ExportSource, *, cached: bool = True) -> None:
        """Load the file.

        Args:
            folder: of the export.
            file: the graph, as a path inside of it.
            source: what was exported; gives the suppressed tokens.
            cached: whether the graph takes keys and values of earlier tokens.

        Raises:
            UserError: a library is not installed.
        """
        import_onnx()
        import onnxruntime

        from tiny_lm.export.onnx_generate import OnnxModel  # imports onnxruntime at its top

        self._model = OnnxModel(folder, file, threads=torch.get_num_threads())
        self._model.tokenizer.encode_special_tokens = True  # special tokens in the text are ordinary text
        self._cached, self._suppressed, self._eos_id = cached, suppressed_tokens(source), source.tokenizer.eos_id
        self.name = f"onnxruntime {onnxruntime.__version__}"

    def encode(self, text: str) -> list[int]:
        """Encode without special tokens."""
        ids: list[int] = self._model.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_document_start(self, text: str) -> list[int]:
        """Encode with the default special tokens."""
        ids: list[int] = self._model.tokenizer.encode(text).ids
        return ids

    def log_probabilities(self, ids: Sequence[int]) -> Tensor:
        """Run one forward pass over all ids."""
        return self.batch_log_probabilities(torch.tensor([list(ids)]), torch.ones(1, len(ids), dtype=torch.int64))[0]

    def batch_log_probabilities(self, ids: Tensor, mask: Tensor, *, pieces: Sequence[int] = ()) -> Tensor:
        """Run one forward pass over padded rows.

        Args:
            ids: [B, T].
            mask: [B, T], 1 for a token and 0 for padding.
            pieces: number of columns per call, with the cache; empty: all in one call.

        Returns:
            log-probabilities after each of ``ids``, float32 [B, T, V].
        """
        past, end, parts = self._model.empty_past(len(ids)), 0, []
        for count in pieces or [ids.shape[1]]:
            start, end = end, end + count
            logits, past = self._model.forward(ids[:, start:end].numpy(), mask[:, :end].numpy(), past)
            parts.append(logits)
        return torch.from_numpy(np.concatenate(parts, axis=1)).log_softmax(dim=-1)

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """Decode one token at a time, with the cache if the graph has one."""
        if self._cached:
            return list(self._model.stream(ids, count))
        return greedy_decode(self, ids, count, suppressed=self._suppressed, eos_id=self._eos_id)
