"""Convert weights to and from Hugging Face's names: one table of tensors per family, used in both directions."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tiny_lm.config import shorten
from tiny_lm.errors import UserError
from tiny_lm.model.architectures import build_model
from tiny_lm.model.config import ModelConfig


@dataclass(frozen=True)
class WeightMapping:
    """One Hugging Face tensor: ours concatenated along dimension 0, then transposed if it is stored so there."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False  # GPT-2's Conv1D stores (in, out)


# `{i}` is the block, `*` weight and bias. A bias that we do not have is zero in theirs.
_GPT2_MAPPINGS = (
    WeightMapping("transformer.wte.weight", ("token_emb.weight",)),
    WeightMapping("transformer.wpe.weight", ("pos_emb.pos_emb.weight",)),
    WeightMapping("transformer.h.{i}.ln_1.*", ("blocks.{i}.norm1.*",)),
    WeightMapping(
        "transformer.h.{i}.attn.c_attn.*",
        ("blocks.{i}.attn.W_q.*", "blocks.{i}.attn.W_k.*", "blocks.{i}.attn.W_v.*"),
        transposed=True,
    ),
    WeightMapping("transformer.h.{i}.attn.c_proj.*", ("blocks.{i}.attn.out_proj.*",), transposed=True),
    WeightMapping("transformer.h.{i}.ln_2.*", ("blocks.{i}.norm2.*",)),
    WeightMapping("transformer.h.{i}.mlp.c_fc.*", ("blocks.{i}.ffn.fc1.*",), transposed=True),
    WeightMapping("transformer.h.{i}.mlp.c_proj.*", ("blocks.{i}.ffn.fc2.*",), transposed=True),
    WeightMapping("transformer.ln_f.*", ("final_norm.*",)),
)
_ATTENTION_MAPPINGS = (
    WeightMapping("model.embed_tokens.weight", ("token_emb.weight",)),
    WeightMapping("model.layers.{i}.input_layernorm.*", ("blocks.{i}.norm1.*",)),
    WeightMapping("model.layers.{i}.self_attn.q_proj.*", ("blocks.{i}.attn.W_q.*",)),
    WeightMapping("model.layers.{i}.self_attn.k_proj.*", ("blocks.{i}.attn.W_k.*",)),
    WeightMapping("model.layers.{i}.self_attn.v_proj.*", ("blocks.{i}.attn.W_v.*",)),
    WeightMapping("model.layers.{i}.self_attn.o_proj.*", ("blocks.{i}.attn.out_proj.*",)),
    WeightMapping("model.layers.{i}.post_attention_layernorm.*", ("blocks.{i}.norm2.*",)),
    WeightMapping("model.norm.*", ("final_norm.*",)),
)
_SMALLLM_MAPPINGS = (
    *_ATTENTION_MAPPINGS,
    WeightMapping("model.layers.{i}.mlp.c_fc.*", ("blocks.{i}.ffn.fc1.*",)),
    WeightMapping("model.layers.{i}.mlp.c_proj.*", ("blocks.{i}.ffn.fc2.*",)),
)
_LLAMA3_MAPPINGS = (
    *_ATTENTION_MAPPINGS,
    WeightMapping("model.layers.{i}.mlp.gate_proj.*", ("blocks.{i}.ffn.w1.*",)),
    WeightMapping("model.layers.{i}.mlp.down_proj.*", ("blocks.{i}.ffn.w2.*",)),
    WeightMapping("model.layers.{i}.mlp.up_proj.*", ("blocks.{i}.ffn.w3.*",)),
)
_QWEN3_MAPPINGS = (
    *_LLAMA3_MAPPINGS,
    WeightMapping("model.layers.{i}.self_attn.q_norm.*", ("blocks.{i}.attn.q_norm.*",)),
    WeightMapping("model.layers.{i}.self_attn.k_norm.*", ("blocks.{i}.attn.k_norm.*",)),
)
_MAPPINGS = {"gpt2": _GPT2_MAPPINGS, "smalllm": _SMALLLM_MAPPINGS, "llama3": _LLAMA3_MAPPINGS, "qwen3": _QWEN3_MAPPINGS}

EMBEDDING = {family: table[0].theirs for family, table in _MAPPINGS.items()}
"""Hugging Face's name of the token embedding, which is also the head of a tied model."""

HEAD = "lm_head.weight"
"""Their and our name of the head."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Buffers that old versions of transformers stored like weights.
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def weight_mappings(config: ModelConfig) -> Iterator[WeightMapping]:
    """Yield a family's mappings with all placeholders filled in, one per Hugging Face tensor."""
    for mapping in _MAPPINGS[config.architecture]:
        for i in range(config.n_layers) if "{i}" in mapping.theirs else (0,):
            for kind in ("weight", "bias") if mapping.theirs.endswith("*") else ("",):
                if kind == "bias" and not _has_bias(config, mapping.theirs):
                    continue
                names = [name.replace("{i}", str(i)).replace("*", kind) for name in (mapping.theirs, *mapping.ours)]
                yield WeightMapping(names[0], tuple(names[1:]), mapping.transposed and kind == "weight")
    if not config.tie_word_embeddings:
        yield WeightMapping(HEAD, (HEAD,))


def _has_bias(config: ModelConfig, theirs: str) -> bool:
    if config.architecture in ("gpt2", "smalllm"):
        return True
    if "_proj" in theirs:
        return config.ffn_bias if ".mlp." in theirs else config.qkv_bias
    return False


def to_huggingface_state(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert our state dict to theirs, without a tied head.

    Args:
        config: the config of our model.
        state: our state dict.
    """
    result: dict[str, Tensor] = {}
    for mapping in weight_mappings(config):
        present = [state[name] for name in mapping.ours if name in state]
        if present:
            joined = torch.cat(present)
            result[mapping.theirs] = (joined.T if mapping.transposed else joined).contiguous()
        else:  # a bias that only theirs has
            weights = [state[name.removesuffix("bias") + "weight"] for name in mapping.ours]
            result[mapping.theirs] = weights[0].new_zeros(sum(weight.shape[0] for weight in weights))
    return result


def from_huggingface_state(
    config: ModelConfig, state: Mapping[str, Tensor], *, source: str = "model.safetensors"
) -> dict[str, Tensor]:
    """Convert their state dict to ours.

    Args:
        config: the config of our model.
        state: their state dict, with or without a tied head.
        source: prefix of error messages.

    Raises:
        UserError: a tensor is missing, unexpected or of the wrong shape, or a tied head differs from the embedding.
    """
    shapes = {name: tensor.shape for name, tensor in build_model(config, device="meta").state_dict().items()}
    rest = _with_prefix(config, state)
    embedding = rest.get(EMBEDDING[config.architecture])
    head = rest.pop(HEAD, embedding) if config.tie_word_embeddings else embedding
    result: dict[str, Tensor] = {}
    for mapping in weight_mappings(config):
        tensor = rest.pop(mapping.theirs, None)
        names = [name for name in mapping.ours if name in shapes]
        if tensor is None:
            raise UserError(f"{source}: the tensor {mapping.theirs} is missing")
        if tensor.dtype not in _DTYPES:
            raise UserError(
                f"{source}: {mapping.theirs} is stored as {str(tensor.dtype).removeprefix('torch.')}; weights must be "
                "float32, float16, bfloat16 or float64"
            )
        if not names:
            if tensor.any():
                raise UserError(f"{source}: {mapping.theirs} is not zero, but {config.architecture} has no such bias")
            continue
        joined = tensor.T if mapping.transposed else tensor
        lengths = [shapes[name][0] for name in names]
        expected = (sum(lengths), *shapes[names[0]][1:])
        if joined.shape != expected:
            shape = expected[::-1] if mapping.transposed else expected
            raise UserError(
                f"{source}: {mapping.theirs} has the shape {tuple(tensor.shape)}, but the config says {tuple(shape)}"
            )
        parts = torch.split(joined, lengths)
        result |= {name: part.contiguous() for name, part in zip(names, parts, strict=True)}
    if rest:
        raise UserError(f"{source}: unexpected tensor {shorten(min(rest))}: {config.architecture} has none such")
    assert head is not None and embedding is not None  # the embedding is in the table of every family
    if head is not embedding and not torch.equal(head, embedding):
        raise UserError(
            f"{source}: the head differs from the embedding, though config.json has tie_word_embeddings true; "
            "set it to false there to keep both"
        )
    if config.tie_word_embeddings:
        result[HEAD] = result["token_emb.weight"]
    return result


def _with_prefix(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the prefix that files of a model without head lack, and drop buffers."""
    embedding = EMBEDDING[config.architecture]
    prefix = embedding.partition(".")[0] + "."
    bare = embedding not in state and embedding.removeprefix(prefix) in state
    return {
        prefix + name if bare and name != HEAD else name: tensor
        for name, tensor in state.items()
        if not name.endswith(_BUFFERS)
    }
