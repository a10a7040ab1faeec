"""SmallLM: GPT-2 with rotary positions."""

from typing import Any

from tiny_lm.model.config import SmallLMConfig
from tiny_lm.model.transformer import Transformer


class SmallLM(Transformer):
    """GPT-2 with rotary positions, exported as ``Starcoder2ForCausalLM``.

    Args:
        config: the config; or pass its keys as keyword arguments.
        values: keys of :class:`~tiny_lm.model.config.SmallLMConfig`.
    """

    def __init__(self, config: SmallLMConfig | None = None, **values: Any) -> None:
        super().__init__(config or SmallLMConfig.from_dict(values))
