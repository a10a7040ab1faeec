"""Qwen3."""

from typing import Any

from tiny_lm.model.config import Qwen3Config
from tiny_lm.model.transformer import Transformer


class Qwen3(Transformer):
    """Qwen3 (arXiv:2505.09388): Llama 3 with normalized queries and keys; exported as ``Qwen3ForCausalLM``.

    Args:
        config: the config; or pass its keys as keyword arguments.
        values: keys of :class:`~tiny_lm.model.config.Qwen3Config`.
    """

    def __init__(self, config: Qwen3Config | None = None, **values: Any) -> None:
        super().__init__(config or Qwen3Config.from_dict(values))
