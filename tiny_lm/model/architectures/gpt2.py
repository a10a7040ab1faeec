"""GPT-2."""

from typing import Any

from tiny_lm.errors import UserError
from tiny_lm.model.config import GPT2Config
from tiny_lm.model.transformer import Block, Transformer


class GPT2Block(Block):
    """A block of GPT-2: LayerNorm, multi-head attention, GELU feed-forward."""


class GPT2(Transformer):
    """GPT-2 (Radford et al. 2019), exported as ``GPT2LMHeadModel``.

    Args:
        config: the config; or pass its keys as keyword arguments, as in ``GPT2(vocab_size=8000, d_model=256, ...)``.
        ffn_dropout: must equal ``resid_dropout``, which also applies to the feed-forward's output.
        values: keys of :class:`~tiny_lm.model.config.GPT2Config`.

    Raises:
        UserError: a value is invalid.
    """

    block_class = GPT2Block

    def __init__(self, config: GPT2Config | None = None, *, ffn_dropout: float | None = None, **values: Any) -> None:
        config = config or GPT2Config.from_dict(values)
        if ffn_dropout not in (None, config.dropouts.residual):
            raise UserError(f"ffn_dropout: must equal resid_dropout={config.dropouts.residual} (got {ffn_dropout})")
        super().__init__(config)
