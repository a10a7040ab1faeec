"""Transformers as an engine: the exported folder, loaded as users do."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_lm.errors import UserError


def import_transformers() -> ModuleType:
    """Import transformers; raise UserError if it is not installed."""
    try:
        import transformers
    except ImportError:
        raise UserError(
            "an export is checked with transformers, which is not installed: pip install 'tiny-lm[export]'"
        ) from None
    module: ModuleType = transformers
    return module


class TransformersEngine:
    """Loads a folder with ``AutoModelForCausalLM`` and ``AutoTokenizer``, in float32."""

    def __init__(self, folder: Path) -> None:
        """Load the folder.

        Raises:
            UserError: transformers is not installed.
        """
        transformers = import_transformers()
        logging = transformers.utils.logging
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            # transformers 4 calls it torch_dtype, and before 4.56 ends in a TypeError on dtype.
            key = "dtype" if hasattr(transformers.PretrainedConfig, "dtype") else "torch_dtype"
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, **{key: torch.float32}
            )
        finally:
            logging.set_verbosity(verbosity)
            logging.enable_progress_bar()
        self._model = model.eval()
        self.name = f"transformers {transformers.__version__}, {type(model).__name__}"

    def encode(self, text: str) -> list[int]:
        """Encode; special tokens in the text are treated as text."""
        ids: list[int] = self._tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )  # verbose=False: texts longer than the context are expected here
        return ids

    def encode_document_start(self, text: str) -> list[int]:
        """Encode as a plain call does."""
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids

    @torch.no_grad()
    def log_probabilities(self, ids: Sequence[int]) -> Tensor:
        """Run the model over all ids at once."""
        return F.log_softmax(self._model(torch.tensor([list(ids)])).logits[0].float(), dim=-1)

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """Call ``generate`` without sampling."""
        inputs = torch.tensor([list(ids)])
        made = self._model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=count,
            do_sample=False,
            temperature=None,
            top_k=None,
            top_p=None,
        )
        continuation: list[int] = made[0, len(ids) :].tolist()
        eos_id = self._model.generation_config.eos_token_id
        return continuation[: continuation.index(eos_id)] if eos_id in continuation else continuation
