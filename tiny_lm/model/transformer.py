"""One decoder-only transformer, and the four families that are built from it.

Shapes: B batch, T tokens, D model width, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import Self

from tiny_lm.errors import UserError
from tiny_lm.model.attention import MultiHeadAttention, blocked_attention
from tiny_lm.model.cache import KVCache
from tiny_lm.model.config import GPT2Config, Llama3Config, ModelConfig, Qwen3Config, SmallLMConfig
from tiny_lm.model.layers import (
    FeedForward,
    LayerNorm,
    LearnedPositionalEmbedding,
    NoPositions,
    NoRotation,
    RMSNorm,
    RoPE,
    Rotation,
    SwiGLU,
    dropout,
    keep,
    rotate,
)

NORMS: Mapping[str, type[LayerNorm | RMSNorm]] = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}
TURNS: Mapping[str, Callable[[Tensor, Any], Tensor]] = {"learned": keep, "rope": rotate}
FEED_FORWARDS: Mapping[str, type[FeedForward | SwiGLU]] = {"gelu": FeedForward, "swiglu": SwiGLU}


class Block(nn.Module):
    """A pre-norm block: attention and a feed-forward, each adding to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        norm = NORMS[config.norm]
        head_norm = RMSNorm if config.qk_norm else nn.Identity
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
            turn=TURNS[config.position],
            q_norm=head_norm(config.head_size, eps=config.norm_eps),
            k_norm=head_norm(config.head_size, eps=config.norm_eps),
        )
        self.norm2 = norm(config.d_model, eps=config.norm_eps)
        self.ffn = FEED_FORWARDS[config.feed_forward](config.d_model, config.ffn_size, bias=config.ffn_bias)
        self.dropout = dropout(config.dropouts.residual)

    def forward(self, x: Tensor, rotation: Rotation | None, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        """Add attention and feed-forward to ``x`` [B, T, D]; the rest as for ``MultiHeadAttention.forward``."""
        x = x + self.dropout(self.attn(self.norm1(x), rotation, mask, cache))
        y: Tensor = x + self.dropout(self.ffn(self.norm2(x)))
        return y


def _run(block: nn.Module, *inputs: Any) -> Tensor:
    """Run a block and keep its activations for the backward pass."""
    y: Tensor = block(*inputs)
    return y


def _run_checkpointed(block: nn.Module, *inputs: Any) -> Tensor:
    """Run a block and keep only its input; the backward pass runs it again (Chen et al. 2016, arXiv:1604.06174)."""
    y: Tensor = checkpoint(block, *inputs, use_reentrant=False)
    return y


def _check_tied_head(model: nn.Module, state: Mapping[str, Tensor], prefix: str, *_: object) -> None:
    """Check that weights for a tied model have one matrix for both: the second would overwrite the first.

    Raises:
        UserError: they have two different ones.
    """
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
    """Tie the head again: ``load_state_dict(..., assign=True)`` makes two parameters of it."""
    if isinstance(model, Transformer):
        model.tie_head()


class Transformer(nn.Module):
    """A decoder-only language model, put together from the parts that its config names.

    The keys of its state dict are public: ``token_emb.weight``, ``pos_emb.pos_emb.weight`` (learned positions only),
    ``blocks.{i}.norm1|norm2.weight|bias``, ``blocks.{i}.attn.W_q|W_k|W_v|out_proj.weight|bias``,
    ``blocks.{i}.attn.q_norm|k_norm.weight`` (Qwen3), ``blocks.{i}.ffn.fc1|fc2`` or ``w1|w2|w3``
    (gate, down, up), ``final_norm.weight|bias`` and ``lm_head.weight``, which is ``token_emb.weight`` unless the config
    says ``tie_word_embeddings: false``.

    Args:
        config: the config of any family.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.token_emb = nn.Embedding(config.vocab_size, config.d_model)
        self.pos_emb: nn.Module = NoPositions()
        self.rope: nn.Module = NoRotation()
        if config.position == "rope":
            self.rope = RoPE(config.context_length, config.head_size, config.rope_theta)
        else:
            self.pos_emb = LearnedPositionalEmbedding(config.context_length, config.d_model)
        self.emb_dropout = dropout(config.dropouts.embedding)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.final_norm = NORMS[config.norm](config.d_model, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self._run_block = _run
        self.tie_head()
        self.register_load_state_dict_pre_hook(_check_tied_head)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_tie_head_after_loading)  # type: ignore[no-untyped-call]
        initialize(self)

    def forward(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return the logits [B, T, V] of the token after each of ``input_ids`` [B, T].

        Args:
            input_ids: token ids [B, T].
            cache: from :meth:`new_cache`; ``input_ids`` then continue what each row holds, and are added to it.

        Raises:
            ValueError: there are more tokens than the context, or the cache, has room for.
        """
        logits: Tensor = self.lm_head(self.hidden_states(input_ids, cache))
        return logits

    def hidden_states(
        self, input_ids: Tensor, cache: KVCache | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return what the head sees, [B, T, D] after the final norm; arguments and errors as for :meth:`forward`.

        ``dtype`` is that of the residual stream; that of the embeddings when None.
        """
        batch, length = input_ids.shape
        if length > self.config.context_length:
            raise ValueError(f"{length} tokens do not fit into the context of {self.config.context_length}")
        if cache is None:
            positions, mask = torch.arange(length, device=input_ids.device), None
        else:
            positions, mask = cache.prepare(batch, length)
        x = self.emb_dropout(self.pos_emb(self.token_emb(input_ids), positions))
        x = x.to(dtype or x.dtype)
        rotation = self.rope(positions)  # once for all blocks
        for block in self.blocks:
            x = self._run_block(block, x, rotation, mask, cache)
        if cache is not None:
            cache.advance(length)
        hidden: Tensor = self.final_norm(x)
        return hidden

    def new_cache(self, batch_size: int, max_length: int | None = None, dtype: torch.dtype | None = None) -> KVCache:
        """Return an empty cache on the device of the model.

        Args:
            batch_size: number of sequences.
            max_length: most tokens per sequence; the context length when None.
            dtype: of keys and values; that of the weights when None.

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
        """Make the weight of the head the very parameter that the token embedding has, unless the config unties it."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.token_emb.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `to_empty()` and moves between kinds of devices give each module a parameter of its own.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.tie_head()
        return self

    def enable_gradient_checkpointing(self) -> None:
        """From now on keep only the input of each block in training: less memory, one more forward pass."""
        self._run_block = _run_checkpointed

    def use_blocked_attention(self) -> None:
        """From now on attend in plain matrix products: faster than the fused kernels for short texts on a CPU."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attn.attend = blocked_attention


RESIDUAL_PROJECTIONS = ("attn.out_proj.weight", "ffn.fc2.weight", "ffn.w2.weight")


@torch.no_grad()
def initialize(model: Transformer) -> None:
    """Draw all parameters from torch's generator, as GPT-2 does (Radford et al. 2019, section 2.3).

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


class GPT2(Transformer):
    """GPT-2 (Radford et al. 2019); becomes ``GPT2LMHeadModel``."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)


class Llama3(Transformer):
    """Llama 3 (arXiv:2407.21783); becomes ``LlamaForCausalLM``."""

    def __init__(self, config: Llama3Config) -> None:
        super().__init__(config)


class SmallLM(Transformer):
    """GPT-2 with rotary positions; becomes ``Starcoder2ForCausalLM``."""

    def __init__(self, config: SmallLMConfig) -> None:
        super().__init__(config)


class Qwen3(Transformer):
    """Qwen3 (arXiv:2505.09388), Llama 3 with normed queries and keys; becomes ``Qwen3ForCausalLM``."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(config)


def build_model(config: ModelConfig, *, device: torch.device | str | None = None) -> Transformer:
    """Build the model of a config, with fresh weights.

    Args:
        config: the config of any family.
        device: where its parameters lie; ``"meta"`` gives shapes without memory. None: torch's default device.
    """
    with torch.device(device or torch.get_default_device()):
        match config:
            case GPT2Config():
                return GPT2(config)
            case Llama3Config():
                return Llama3(config)
            case SmallLMConfig():
                return SmallLM(config)
            case Qwen3Config():
                return Qwen3(config)
