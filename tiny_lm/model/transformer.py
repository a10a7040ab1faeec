"""The decoder-only transformer that all architectures are built from.

Shapes: B batch, T tokens, D model width, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import Self

from tiny_lm.errors import UserError
from tiny_lm.model.attention import MultiHeadAttention, blocked_attention
from tiny_lm.model.cache import KVCache
from tiny_lm.model.config import ModelConfig
from tiny_lm.model.feedforward import FeedForward, SwiGLU
from tiny_lm.model.normalization import LayerNorm, RMSNorm
from tiny_lm.model.position import LearnedPositionalEmbedding, RoPE, RotaryFactors

NORMS: Mapping[str, type[LayerNorm | RMSNorm]] = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}
FEED_FORWARDS: Mapping[str, type[FeedForward | SwiGLU]] = {"gelu": FeedForward, "swiglu": SwiGLU}


class Block(nn.Module):
    """A pre-norm block: attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        norm = NORMS[config.norm]
        self.norm1 = norm(config.d_model, eps=config.norm_eps)
        self.attn = MultiHeadAttention(
            layer,
            config.d_model,
            config.n_heads,
            config.kv_heads,
            config.head_size,
            qkv_bias=config.qkv_bias,
            out_bias=config.out_bias,
            dropout=config.dropouts.attention,
            qk_norm_eps=config.norm_eps if config.qk_norm else None,
        )
        self.norm2 = norm(config.d_model, eps=config.norm_eps)
        self.ffn = FEED_FORWARDS[config.feed_forward](config.d_model, config.ffn_size, bias=config.ffn_bias)
        self.dropout = _dropout(config.dropouts.residual)

    def forward(self, x: Tensor, rotary: RotaryFactors | None, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        """Add attention and feed-forward to ``x`` [B, T, D]; arguments as for ``MultiHeadAttention.forward``."""
        x = x + self.dropout(self.attn(self.norm1(x), rotary, mask, cache))
        y: Tensor = x + self.dropout(self.ffn(self.norm2(x)))
        return y


def _dropout(p: float) -> nn.Module:
    return nn.Dropout(p) if p else nn.Identity()


def _check_tied_head(model: nn.Module, state: Mapping[str, Tensor], prefix: str, *_: object) -> None:
    """Raise UserError if a tied model's weights have different head and embedding: one would overwrite the other."""
    head, embedding = (state.get(f"{prefix}{name}.weight") for name in ("lm_head", "token_emb"))
    if not isinstance(model, Transformer) or not model.config.tie_word_embeddings or head is None or embedding is None:
        return
    if head is embedding or head.is_meta or head.shape != embedding.shape:
        return
    if not torch.equal(head, embedding):
        raise UserError(
            "the head (lm_head.weight) is not the embedding (token_emb.weight); set tie_word_embeddings: false in the "
            "model config"
        )


def _tie_head_after_loading(model: nn.Module, _: object) -> None:
    """Tie the head again: ``load_state_dict(..., assign=True)`` separates the parameters."""
    if isinstance(model, Transformer):
        model.tie_head()


class Transformer(nn.Module):
    """A decoder-only language model, built from the parts that its config names.

    State-dict keys are public: ``token_emb.weight``, ``pos_emb.pos_emb.weight`` (learned positions only),
    ``blocks.{i}.norm1|norm2.weight|bias``, ``blocks.{i}.attn.W_q|W_k|W_v|out_proj.weight|bias``,
    ``blocks.{i}.attn.q_norm|k_norm.weight`` (Qwen3), ``blocks.{i}.ffn.fc1|fc2`` or ``w1|w2|w3``
    (gate, down, up), ``final_norm.weight|bias`` and ``lm_head.weight``, which is ``token_emb.weight`` unless the config
    says ``tie_word_embeddings: false``.

    Args:
        config: the config of any family.
    """

    block_class: ClassVar[type[Block]] = Block

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.token_emb = nn.Embedding(config.vocab_size, config.d_model)
        self.pos_emb: LearnedPositionalEmbedding | None = None
        self.rope: RoPE | None = None
        if config.position == "rope":
            self.rope = RoPE(config.head_size, config.context_length, config.rope_theta)
        else:
            self.pos_emb = LearnedPositionalEmbedding(config.context_length, config.d_model)
        self.emb_dropout = _dropout(config.dropouts.embedding)
        self.blocks = nn.ModuleList(self.block_class(config, layer) for layer in range(config.n_layers))
        self.final_norm = NORMS[config.norm](config.d_model, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.tie_head()
        self.register_load_state_dict_pre_hook(_check_tied_head)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_tie_head_after_loading)  # type: ignore[no-untyped-call]
        initialize(self)

    def forward(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return the logits [B, T, V] of the token after each of ``input_ids`` [B, T].

        Args:
            input_ids: token ids [B, T].
            cache: from :meth:`new_cache`; ``input_ids`` continue its rows and are added to it.

        Raises:
            ValueError: there are more tokens than fit into the context or the cache.
        """
        logits: Tensor = self.lm_head(self.hidden_states(input_ids, cache))
        return logits

    def hidden_states(
        self, input_ids: Tensor, cache: KVCache | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return the input of the head, [B, T, D] after the final norm; arguments and errors as for :meth:`forward`.

        ``dtype`` is that of the residual stream; None: that of the embeddings.
        """
        batch, length = input_ids.shape
        if length > self.config.context_length:
            raise ValueError(f"{length} tokens do not fit into the context of {self.config.context_length}")
        if cache is None:
            positions, mask = torch.arange(length, device=input_ids.device), None
        else:
            positions, mask = cache.prepare(batch, length)
        x = self.token_emb(input_ids)
        if self.pos_emb is not None:
            x = self.pos_emb(x, positions)
        x = self.emb_dropout(x)
        x = x.to(dtype or x.dtype)
        rotary = None if self.rope is None else self.rope(positions)  # once for all blocks
        for block in self.blocks:
            if self.gradient_checkpointing:
                x = checkpoint(block, x, rotary, mask, cache, use_reentrant=False)
            else:
                x = block(x, rotary, mask, cache)
        if cache is not None:
            cache.advance(length)
        hidden: Tensor = self.final_norm(x)
        return hidden

    def new_cache(self, batch_size: int, max_length: int | None = None, dtype: torch.dtype | None = None) -> KVCache:
        """Return an empty cache on the model's device.

        Args:
            batch_size: number of sequences.
            max_length: maximum tokens per sequence; None: the context length.
            dtype: of keys and values; None: that of the weights.

        Raises:
            ValueError: ``max_length`` is not between 1 and the context length.
        """
        context = self.config.context_length
        max_length = context if max_length is None else max_length
        if not 1 <= max_length <= context:
            raise ValueError(f"a cache holds 1 to {context} tokens (the context), not {max_length}")
        weight = next(self.parameters())
        shape = (batch_size, self.config.kv_heads, max_length, self.config.head_size)
        keys, values = (
            [torch.zeros(shape, dtype=dtype or weight.dtype, device=weight.device) for _ in self.blocks]
            for _ in range(2)
        )
        return KVCache(keys, values)

    def tie_head(self) -> None:
        """Share the token embedding's parameter with the head, unless the config unties them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.token_emb.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `to_empty()` and moves between device types give each module its own parameter.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.tie_head()
        return self

    def enable_gradient_checkpointing(self) -> None:
        """Keep only the input of each block for the backward pass, which then recomputes it (arXiv:1604.06174)."""
        self.gradient_checkpointing = True

    def use_blocked_attention(self) -> None:
        """Compute attention in plain matrix products: faster than the fused kernels for short sequences on a CPU."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attn.attend = blocked_attention


RESIDUAL_PROJECTIONS = ("attn.out_proj.weight", "ffn.fc2.weight", "ffn.w2.weight")


@torch.no_grad()
def initialize(model: Transformer) -> None:
    """Initialize all parameters from torch's generator, as GPT-2 does (Radford et al. 2019, section 2.3).

    | parameter                                | value                             |
    |------------------------------------------|-----------------------------------|
    | embeddings, matrices                     | normal, 0.02                      |
    | matrices that write to the residual      | normal, 0.02 / sqrt(2 * n_layers) |
    | stream (attn.out_proj, ffn.fc2, ffn.w2)  | or 0 (``residual_init: zero``)    |
    | biases                                   | 0                                 |
    | scales of norms                          | 1                                 |
    """
    scaled = 0.02 / (2 * model.config.n_layers) ** 0.5
    residual_std = {"scaled": scaled, "zero": 0.0}[model.config.residual_init]
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=residual_std if name.endswith(RESIDUAL_PROJECTIONS) else 0.02)
