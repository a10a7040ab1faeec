"""llama.cpp as an engine, through llama-cpp-python."""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_lm.errors import UserError
from tiny_lm.export.source import ExportSource
from tiny_lm.export.verify import suppressed_tokens

_ERROR_LEVEL = 4  # ggml_log_level


def import_llama_cpp() -> Any:
    """Import llama-cpp-python; raise UserError if it is not installed."""
    try:
        import llama_cpp
    except ImportError:
        raise UserError(
            "a GGUF file is checked with llama.cpp, which is not installed: pip install 'tiny-lm[llamacpp]' "
            "(it is built from source in some minutes)"
        ) from None
    return llama_cpp


class LlamaCppEngine:
    """Runs a GGUF file on the CPU, with a float32 KV cache and without flash attention."""

    def __init__(self, file: Path, source: ExportSource) -> None:
        """Load the file.

        Args:
            file: a GGUF file.
            source: what was exported; gives context length and suppressed tokens.

        Raises:
            UserError: llama-cpp-python is not installed, or llama.cpp cannot load the file.
        """
        self._library = library = import_llama_cpp()
        self._complaints = _listen(library)
        self._suppressed, self._eos_id = suppressed_tokens(source), source.tokenizer.eos_id
        library.llama_backend_init()
        model_options = library.llama_model_default_params()
        model_options.n_gpu_layers = 0
        self._model = library.llama_model_load_from_file(str(file).encode(), model_options)
        if not self._model:
            raise UserError(f"{file}: llama.cpp cannot load it ({self._complaint()})")
        options = library.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = source.config.context_length
        options.type_k = options.type_v = library.GGML_TYPE_F32
        options.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        # Its threads spin while waiting, so more threads than free cores are extremely slow.
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self._context = library.llama_init_from_model(self._model, options)
        if not self._context:
            library.llama_model_free(self._model)
            raise UserError(f"{file}: llama.cpp cannot run it ({self._complaint()})")
        self._vocab = library.llama_model_get_vocab(self._model)
        self._size = library.llama_vocab_n_tokens(self._vocab)
        self.name = f"llama.cpp (llama-cpp-python {library.__version__})"

    def close(self) -> None:
        """Free the memory."""
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)

    def _complaint(self) -> str:
        return self._complaints[0] if self._complaints else "it gives no reason"

    def encode(self, text: str) -> list[int]:
        """Tokenize without parsing special tokens in the text."""
        return self._tokenize(text, add_special=False)

    def encode_document_start(self, text: str) -> list[int]:
        """Tokenize as llama.cpp's programs do."""
        return self._tokenize(text, add_special=True)

    def _tokenize(self, text: str, *, add_special: bool) -> list[int]:
        data = text.encode()
        room = len(data) + 8
        tokens = (self._library.llama_token * room)()
        count = self._library.llama_tokenize(self._vocab, data, len(data), tokens, room, add_special, False)
        return list(tokens[:count])

    def log_probabilities(self, ids: Sequence[int]) -> Tensor:
        """Run one forward pass over all ids."""
        self._forget()
        return self._run(ids, 0, everywhere=True)

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """Decode one token at a time, with the cache."""
        self._forget()
        text, read = list(ids), 0
        for _ in range(count):
            last = self._run(text[read:], read, everywhere=False)[-1]
            read = len(text)
            last[self._suppressed] = float("-inf")
            token = int(last.argmax())
            if token == self._eos_id:
                break
            text.append(token)
        return text[len(ids) :]

    def _forget(self) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def _run(self, ids: Sequence[int], position: int, *, everywhere: bool) -> Tensor:
        """Decode ``ids`` at ``position``; return log-probabilities after each of them, [T, V], or the last, [1, V]."""
        batch = self._library.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = token, position + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = everywhere or i == len(ids) - 1
        code = self._library.llama_decode(self._context, batch)
        self._library.llama_batch_free(batch)
        assert code == 0, f"llama_decode returned {code}: {self._complaint()}"
        count = len(ids) if everywhere else 1
        pointer = ctypes.cast(self._library.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float))
        logits = np.ctypeslib.as_array(pointer, shape=(count, self._size)).copy()
        return F.log_softmax(torch.from_numpy(logits), dim=-1)


_listeners: list[Any] = []  # a callback must live as long as the library may call it


def _listen(library: Any) -> list[str]:
    """Redirect llama.cpp's log from standard error; return the list that collects its errors."""
    complaints: list[str] = []

    def hear(level: int, text: bytes, user_data: Any) -> None:
        if level == _ERROR_LEVEL:
            complaints.append(text.decode("utf-8", errors="replace").strip())

    callback = library.llama_log_callback(hear)
    _listeners[:] = [callback]
    library.llama_log_set(callback, ctypes.c_void_p(0))
    return complaints


def quantize_file(source: Path, target: Path, file_type: int) -> None:
    """Write a quantized copy of a float32 GGUF file.

    Args:
        source: a float32 file.
        target: to write.
        file_type: llama.cpp's number of the mixture of types (``llama_ftype``).

    Raises:
        UserError: llama-cpp-python is not installed, or the file could not be written.
    """
    library = import_llama_cpp()
    complaints = _listen(library)
    options = library.llama_model_quantize_default_params()
    options.ftype = file_type
    options.nthread = torch.get_num_threads()
    code = library.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options))
    if code != 0:
        reason = complaints[0] if complaints else f"code {code}"
        raise UserError(f"{target}: llama.cpp could not quantize the model; is the disk full? ({reason})")
