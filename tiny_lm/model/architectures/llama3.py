"""Llama 3."""

from typing import Any

from tiny_lm.model.config import Llama3Config
from tiny_lm.model.transformer import Block, Transformer


class Llama3Block(Block):
    """A block of Llama 3: RMSNorm, grouped-query attention with rotary positions, SwiGLU."""


class Llama3(Transformer):
    """Llama 3 (arXiv:2407.21783), exported as ``LlamaForCausalLM``.

    Args:
        config: the config; or pass its keys as keyword arguments.
        values: keys of :class:`~tiny_lm.model.config.Llama3Config`.
    """

    block_class = Llama3Block

    def __init__(self, config: Llama3Config | None = None, **values: Any) -> None:
        super().__init__(config or Llama3Config.from_dict(values))
